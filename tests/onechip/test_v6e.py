"""Training steps compiled for a v6e, and other TPUs, on this machine. Each program is compiled once."""

import dataclasses
import importlib
import re

import jax
import pytest

from onechip import check_compare, check_sizes, check_time
from onechip.chips import GIB, topology_devices
from onechip.doors import config_with
from onechip.fit import DoesNotFit, measure, peak_rate, require_fit
from onechip.fitreport import describe

train = importlib.import_module("02_train")

pytestmark = pytest.mark.slow
# Two layers, and both kinds of window; V 1024, D 256, F 1024.
CHIP = train.Config(
    n_head=2, n_kv_head=1, head_dim=128, aspect_ratio=128, vocab_size=1024, seq_len=512, device_batch_size=2,
    total_batch_size=4, window_pattern="S",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def full_compiler():
    """libtpu, and the compiler with all its optimizations."""
    pytest.importorskip("libtpu", reason="compiling for v6e needs libtpu: jax[tpu]")
    jax.config.update("jax_disable_most_optimizations", False)


KEPT = {}  # of programs that were compiled: a Model is no key of functools.cache


def kept(key, make):
    """make(), once for each key."""
    if key not in KEPT:
        KEPT[key] = make()
    return KEPT[key]


def work_on(topology, model=train.GPT):
    """The Workload of a model on a topology's devices."""
    make = lambda: train.workload(train.make_mesh(topology_devices(topology)), model)
    return kept((topology, model.name), make)


def fit_on_v6e(config, model=train.GPT):
    """The Fit of a config on one v6e."""
    return kept((config, model.name), lambda: measure(work_on("v6e:1x1", model), config))


def count_kernels(compiled):
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


def state_bytes(config, model=train.GPT):
    """Parameters and two moments, float32."""
    return 12 * train.count_params(config, model)["total"]


@pytest.mark.parametrize("impl, kernels_per_layer", [("splash", 3), ("pallas", 2), ("einsum", 0), ("jax", 0)])
def test_a_v6e_program_has_the_kernels_its_attention_promises(impl, kernels_per_layer):
    """A kernel interpreted in a chip's program would be a thousand times slower."""
    fit = fit_on_v6e(dataclasses.replace(CHIP, attn_impl=impl))
    of_rows = 1 if kernels_per_layer else 0  # that adds up the gradients of wte
    assert count_kernels(fit.compiled) == kernels_per_layer * CHIP.n_layer + of_rows == kernels_per_layer * 2 + of_rows
    assert fit.fits
    assert fit.limit_bytes == int(31.25 * 2**30)


@pytest.mark.parametrize("impl", ["splash", "pallas", "einsum", "jax"])
def test_a_v6e_program_holds_its_state_once(impl):
    """A state that is not donated would be there twice; constants and temporaries are small."""
    fit = fit_on_v6e(dataclasses.replace(CHIP, attn_impl=impl))
    memory, state = fit.compiled.memory_analysis(), state_bytes(CHIP)
    assert memory.alias_size_in_bytes >= state  # donated
    assert memory.temp_size_in_bytes < 8 * 2**20  # 4.7 to 6.3 MiB on jax 0.7.2 to 0.12
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert state < kept < 1.1 * state
    assert kept + memory.temp_size_in_bytes <= fit.peak_bytes < 1.1 * state + 48 * 2**20  # 30 MiB of it: the program


def test_a_program_for_a_chip_is_the_one_that_is_measured():
    """compile_for_chip, by its topology's name, gives the program whose bytes the Fit states."""
    config = dataclasses.replace(CHIP, attn_impl="pallas")
    compiled = train.compile_for_chip(config, "v6e:1x1")
    assert compiled.memory_analysis().peak_memory_in_bytes == fit_on_v6e(config).peak_bytes
    assert count_kernels(compiled) == 4 + 1


# GiB that one layer of each preset may take; the chip's is below, with all its layers.
BOUNDS = {"gpu": 7.0, "laptop": 0.2}


@pytest.mark.parametrize("preset", sorted(train.PRESETS.keys() - {"chip"}))
def test_every_preset_compiles_for_a_v6e(preset):
    """One layer and two microbatches of each: a change that breaks the chip, or takes twice the memory, fails here."""
    whole = train.Config(**train.PRESETS[preset])
    config = dataclasses.replace(whole, aspect_ratio=whole.n_embd, total_batch_size=2 * whole.device_batch_size)
    fit = fit_on_v6e(config)
    assert state_bytes(config) < fit.peak_bytes < BOUNDS[preset] * GIB
    assert count_kernels(fit.compiled) == (2 + 1 if whole.attn_impl == "pallas" else 0)
    assert fit.step_seconds > 0


@pytest.mark.colab
def test_the_default_model_fits_a_v6e_with_room():
    """All 16 layers at 4 x 2048 tokens: under 7 GiB of 31.25, two kernels a layer, twice the plain design's speed."""
    config = train.Config(**train.PRESETS["chip"] | {"device_batch_size": 4, "total_batch_size": 4})
    fit = fit_on_v6e(config)
    assert count_kernels(fit.compiled) == 2 * 16
    assert fit.peak_bytes < 7 * GIB  # 17.4 in the plain design
    assert fit.bytes_per_token < 9e6  # 16.8e6
    assert 1e9 * fit.step_seconds / (4 * 2048) < 5290  # 10,580
    text = describe(config, fit, peak_rate(work_on("v6e:1x1"), config))
    assert " of 31.25 GiB: parameters 1, optimizer 2" in text and "compiler's estimate" in text


def test_the_gated_model_holds_the_logits_of_one_slice_only():
    """Two layers at full width and context compile for a v6e with their kernels; of 4,096 logits, 1,024 exist."""
    maxtext = importlib.import_module("04_maxtext")
    config = maxtext.Config(n_layer=2, total_batch_size=8)
    compiled = fit_on_v6e(config, maxtext.SWIGLU).compiled
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2 * config.n_layer + 1
    assert "[1024,32768]" in text
    whole = re.findall(r"\[(?:4096|2,2048),32768\]", text)
    assert whole == []
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= state_bytes(config, maxtext.SWIGLU)
    assert memory.temp_size_in_bytes < 3 * 2**30


def test_muon_and_value_embeddings_compile_for_a_v6e():
    """Two layers of depth 12's width, 2 of 256 sequences: kernels for both windows, and Muon's products in bfloat16."""
    speedrun = importlib.import_module("05_speedrun")
    config = config_with(speedrun.Config, speedrun.MuonSettings)(
        depth=2, n_embd=768, n_kv_head=6, vocab_size=2048, device_batch_size=1, total_batch_size=2
    )
    work = train.workload(work_on("v6e:1x1").mesh, speedrun.NANOCHAT, speedrun.MUON)
    kernels = {f"attention_{pass_}_{window}" for pass_ in ("forward", "backward") for window in (513, 2048)}
    # What is compiled names its kernels; of the program, jax 0.7.2 does not say.
    assert set(re.findall(r'kernel_name = "(\w+)"', work.lower(config).as_text())) == {*kernels, "add_rows"}
    fit = measure(work, config)
    assert count_kernels(fit.compiled) == 2 * 2 + 1
    assert re.search(r"bf16\[(?:8,)?768,768\]\S* (?:convolution|dot|fusion)\(", fit.compiled.as_text())
    # AdamW keeps two moments of each weight, Muon one and a vector.
    counts = train.count_params(config, speedrun.NANOCHAT)
    state = 12 * counts["total"] - 4 * (counts["attention"] + counts["mlp"])
    memory = fit.compiled.memory_analysis()
    assert state < memory.alias_size_in_bytes < 1.02 * state
    assert fit.fits and fit.step_seconds > 0


def test_remat_takes_less_of_a_v6e_and_more_of_its_time():
    """Two layers of 16 x 512 tokens: what is not kept is not there, and is computed again."""
    config = dataclasses.replace(CHIP, device_batch_size=16, total_batch_size=16)
    fits = [fit_on_v6e(dataclasses.replace(config, remat=remat)) for remat in ("none", "dots", "all")]
    none, dots, everything = (fit.parts["activations"] for fit in fits)
    assert everything < 0.85 * none and everything <= dots <= none
    none, dots, everything = (fit.step_seconds for fit in fits)
    assert none < dots <= everything < 1.5 * none


def test_a_slice_of_eight_chips_sums_its_gradients():
    """Eight chips take an eighth of the batch each."""
    work = work_on("v6e:2x4")
    assert work.mesh.size == 8
    fit = measure(work, dataclasses.replace(CHIP, total_batch_size=16))
    assert "all-reduce" in fit.compiled.as_text() and fit.fits


def test_a_v5e_refuses_what_a_v6e_takes():
    """15.75 GiB are too few for 15 GiB of tables and moments; three layers of four would fit."""
    tables = {"vocab_size": 5 << 18, "seq_len": 256, "loss_slice": 256}
    large = train.Config(n_head=4, aspect_ratio=128, device_batch_size=1, total_batch_size=1, **tables)
    wanted = "GiB of the 15.75 GiB of 1 x TPU v5 lite; n_head=3, n_kv_head=3 fits, with"
    with pytest.raises(DoesNotFit, match=wanted):
        require_fit(work_on("v5e:1x1"), large)
    assert require_fit(work_on("v6e:1x1"), large).fits


# ----------------------------------------------------------------------------------------------------------------------
# A check's programs (onechip/check*.py), at the sizes that they have on a chip

CASES = check_sizes.QUICK_CASES


def on_v6e(tree):
    """Arrays, or their shapes, as they would lie on one v6e."""
    place = jax.sharding.SingleDeviceSharding(work_on("v6e:1x1").mesh.devices.flat[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)


# Every case with the kernels; what XLA makes of plain attention, minutes each, at one.
ATTENTION_CASES = [
    *((impl, case) for impl in ("splash", "pallas") for case in CASES if impl == "pallas" or not case.gated),
    *((impl, CASES[1]) for impl in ("einsum", "jax")),
]


@pytest.mark.parametrize("impl, case", ATTENTION_CASES, ids=[f"{impl}, {case.words}" for impl, case in ATTENTION_CASES])
def test_a_checks_attention_compiles_for_a_v6e(impl, case):
    """Value and gradients in bfloat16, by its kernels where it has any."""
    rope = train.what_to_check("chip").rope(case.T, case.H)
    arrays, g = on_v6e(jax.eval_shape(lambda: check_compare.attention_inputs(case)))
    compiled = check_compare.lower_attention(train.ATTENTIONS[impl], rope, case).lower(arrays, g).compile()
    assert count_kernels(compiled) == {"splash": 3, "pallas": 2}.get(impl, 0)


def test_the_reference_of_a_check_multiplies_float32_on_a_v6e():
    """A TPU multiplies float32 in one pass of bfloat16 unless it is asked not to; the program asks everywhere."""
    case = CASES[1]
    rope = train.what_to_check("chip").rope(case.T, case.H)
    narrow = jax.eval_shape(lambda: check_compare.attention_inputs(case))
    wide = on_v6e(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, "float32"), narrow))
    with jax.default_matmul_precision("highest"):
        text = check_compare.lower_attention(train.attention_einsum, rope, case).lower(*wide).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)


def test_a_checks_pieces_compile_for_a_v6e():
    """Loss, RoPE and norm, ReLU squared, rows added by their kernel, Muon's products, the texts that are written."""
    given, sizes = train.what_to_check("chip"), check_sizes.CHIP
    T, D, V = sizes.tokens, sizes.channels, sizes.vocabulary
    shapes = lambda dtype, *shapes: on_v6e([jax.ShapeDtypeStruct(shape, dtype) for shape in shapes])
    [y] = shapes("int32", (1, T))
    loss = lambda h, head, y: check_compare.sliced_loss(given.pieces, 15.0, T // 2, y)(h, head)
    jax.jit(loss).lower(*shapes("bfloat16", (1, T, D), (D, V)), y).compile()
    cos, sin = given.rope(T, 128)
    for piece in (given.pieces["relu"], lambda x: given.pieces["norm"](x, cos, sin)):
        check_compare.lower_elementwise(piece).lower(*shapes("bfloat16", (1, T, 6, 128), (1, T, 6, 128))).compile()
    add = check_compare.lower_add(given.pieces["add"], T, D, V, True).lower(y, *shapes("bfloat16", (1, T, D)))
    assert count_kernels(add.compile()) == 2
    for shape in sizes.matrices:
        jax.jit(given.orthogonalize).lower(*shapes("bfloat16", (1, *shape))).compile()


@pytest.mark.parametrize("name", ["gpt", "swiglu", "nanochat"])
def test_a_checks_steps_compile_for_a_v6e(name):
    """Two layers of each model at its full width, and the program that writes: they fit, and have an estimate.

    Steps of the others are compiled by tests of their own: the default model's, and the gated one's two layers.
    """
    subject = train.what_to_check("chip").subjects[name]
    config = dataclasses.replace(subject.config, **{"gpt": {"aspect_ratio": 384}, "swiglu": {"n_layer": 2}}.get(
        name, {"depth": 2}), total_batch_size=2 * subject.config.device_batch_size)  # fmt: skip
    assert config.n_layer == 2 and config.n_embd in (768, 1024)
    work = train.workload(work_on("v6e:1x1").mesh, subject.model, subject.optimizer)
    if name == "nanochat":
        fit = measure(work, config)
        assert fit.fits and fit.step_seconds > 0 and count_kernels(fit.compiled) == 2 * 2 + 1
    params = on_v6e(train.state_shapes(config, work.mesh, subject.model, subject.optimizer)["params"])
    prompt, key = on_v6e(jax.eval_shape(lambda: (jax.numpy.zeros((1, 64), "int32"), jax.random.key(0))))
    compiled = train.make_sampler(config, 9, model=subject.model).lower(params, prompt, 64, key).compile()
    device = work.mesh.devices.flat[0]
    assert 0 < check_time.program_seconds(compiled, device) < 1
    assert subject.config.n_layer == 12


def test_a_slice_gathers_weights_and_hides_most_of_it():
    """v6e:2x4: an eighth of the state on a chip, gathers taken apart between products, gradients summed in shares."""
    config = train.Config(n_head=2, aspect_ratio=128, vocab_size=4096, total_batch_size=32)
    works = {text: train.workload(train.make_mesh(topology_devices("v6e:2x4"), text)) for text in ("data=8", "fsdp=8")}
    whole, split = (measure(work, config) for work in works.values())
    assert set(whole.traffic) == {"all-reduce"}
    hidden, waited = split.traffic["all-gather"]
    assert hidden > waited and split.traffic["reduce-scatter"][1] > 0
    counts, microbatches = train.count_params(config), 2
    layers, table = counts["attention"] + counts["mlp"], counts["embed"]
    # In each microbatch layers twice, for the gradient once more, and lm_head; the table once a step: in bfloat16.
    gathered = microbatches * (2 * layers + counts["lm_head"]) + table
    assert hidden + waited == pytest.approx(2 * 7 / 8 * gathered, rel=0.01)
    assert split.parts["parameters"] == pytest.approx(whole.parts["parameters"] / 8, rel=0.01)
    assert split.peak_bytes < whole.peak_bytes and split.whole_bytes == whole.whole_bytes
    text = describe(config, split, peak_rate(works["fsdp=8"], config))
    assert re.search(r"\n  sent to other devices a step: all-reduce .* GB, all-gather .* GB, reduce-scatter", text)
