"""chip.py and the preflight of 02: what a compiler says of a step, what does not fit, and programs for a v6e."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from onechip import kernels

train = importlib.import_module("02_train")

ROOT = Path(__file__).resolve().parent.parent
TINY = train.Config(
    n_head=6, n_kv_head=2, head_dim=14, aspect_ratio=42, vocab_size=31, seq_len=18, attn_impl="einsum", dtype="float32",
    device_batch_size=6, total_batch_size=12, loss_slice=13,
)  # fmt: skip
# Two layers, and both kinds of window; V 1024, D 256, F 1024.
CHIP = train.Config(
    n_head=2, n_kv_head=1, head_dim=128, aspect_ratio=128, vocab_size=1024, seq_len=512, device_batch_size=2,
    total_batch_size=4, window_pattern="S",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# Time

HLO = """HloModule jit_step, entry_computation_layout={()->f32[]}

%fused.1 (p: f32[8]) -> f32[8] {
  ROOT %inside.9 = f32[8] add(%p, %p), backend_config={"estimated_cycles":"999"}
}

%inner.2 (p: (s32[])) -> (s32[]) {
  %a.1 = f32[8] fusion(%p), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"5"}
}

%outer.3 (p: (s32[])) -> (s32[]) {
  %b.1 = f32[8] fusion(%p), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"100"}
  %w.1 = (s32[]) while(%p), condition=%c, body=%inner.2, backend_config={"known_trip_count":{"n":"3"}}
}

%until.5 (p: (s32[])) -> pred[] {
  %bound.1 = s32[]{:T(128)} constant(16)
  ROOT %less.1 = pred[]{:T(512)} compare(%p, %bound.1), direction=LT
}

ENTRY %main.4 (p: f32[8]) -> f32[8] {
  %n.1 = f32[8] fusion(%p), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"9223372036854775807"}
  %d.1 = f32[8] fusion(%p), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"7"}
  %k.1 = f32[8] custom-call(%p), custom_call_target="tpu_custom_call"
  ROOT %w.2 = (s32[]) while(%p), condition=%until.5, body=%outer.3, metadata={op_name="jit(step)/while"}
}
"""


def test_cycles_are_summed_through_loops_within_loops():
    """A loop counts as often as it runs, what is inside a fusion does not, 2 ** 63 - 1 means no estimate. Not
    every loop says how often that is: the bound then stands in its condition."""
    assert xla_cycles(HLO) == 7 + 16 * (100 + 3 * 5)
    assert xla_cycles("HloModule none\n\nENTRY %m (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n") == 0


def test_kernel_cycles_follow_the_tiles_that_a_window_leaves():
    """2048 tokens in tiles of 512: 10 of 16 by causality, 9 with a window of half; heads and sequences multiply."""
    config = train.Config(window_pattern="S", aspect_ratio=512)  # a layer of each window
    assert config.windows == (1024, 2048)
    ours = [4 * (408 + 725) + visited * (535 + 1341) for visited in (9, 10)]
    assert kernel_cycles(config, 5) == 5 * 8 * sum(ours)
    splash = [visited * (4225 + 5126 + 3937) for visited in (3, 3)]
    assert kernel_cycles(dataclasses.replace(config, attn_impl="splash"), 5) == 5 * 8 * sum(splash)
    assert kernel_cycles(dataclasses.replace(config, attn_impl="einsum"), 5) == 0
    unknown = train.Config(n_head=2, head_dim=384, aspect_ratio=384, seq_len=512)
    assert kernel_cycles(unknown, 5) is None


@pytest.mark.parametrize(
    "T, window, b", [(768, 1, 128), (768, 128, 128), (768, 129, 128), (768, 300, 256), (512, 512, 128)]
)
def test_tiles_hold_every_visible_pair_and_mask_where_some_pair_is_not(T, window, b):
    """What the kernels leave out has no visible pair in it, what they do not mask has no other."""
    seen = {}
    for query in range(T):
        for key in range(max(0, query - window + 1), query + 1):
            seen[query // b, key // b] = seen.get((query // b, key // b), 0) + 1
    assert {(i, j): masked for i, j, masked in kernels.tiles(T, window, b)} == {t: n < b * b for t, n in seen.items()}


# ---------------------------------------------------------------------------------------------------------------
# Memory


def test_memory_parts_sum_to_the_peak():
    """Float32 masters and gradients, two moments, bfloat16 weights where computing is in that, a slice of logits."""
    parts = memory_parts(CHIP, 1000, 50_000_000)
    logits = 2 * 512 * 1024 * 2  # 1,024 tokens at a time, fewer than a slice
    assert parts["parameters"] == 4000 and parts["moments"] == 8000 and parts["gradients"] == 4000
    assert parts["bfloat16 weights"] == 2000 and parts["logits"] == logits
    assert sum(parts.values()) == 50_000_000
    single = memory_parts(TINY, 1000, 50_000_000)
    assert "bfloat16 weights" not in single and single["logits"] == 13 * 31 * 4


@pytest.mark.parametrize(
    "text, size",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 45.22G of 31.25G hbm.",
            45.22,
        ),
        (
            "RESOURCE_EXHAUSTED: the total memory for HLO temporaries (19.97G) exceeds HBM (15.75G).",
            19.97,
        ),
        ("INVALID_ARGUMENT: 45.22G of something", None),
    ],
)
def test_an_error_of_the_compiler_is_read(text, size):
    """The largest size that an out-of-memory error names is what was needed; other errors are not swallowed."""
    needed = bytes_needed(RuntimeError(text))
    assert needed == (size and int(size * 2**30))


@pytest.mark.parametrize(
    "fixed, row, limit, start, want",
    [(10, 3, 100, 4, 30), (10, 3, 12, 4, 0), (10, 3, 13, 9, 1), (5, 0.5, 31.25, 4, 52)],
)
def test_the_largest_batch_is_found_in_a_few_programs(fixed, row, limit, start, want):
    """Each guess is minutes of compiling: a line through two programs finds it in at most six, bumps or not."""
    asked = []

    def peak_of(rows):
        asked.append(rows)
        peak = fixed + row * rows + 0.3 * row * (rows % 3)  # not quite a line
        return None if peak > 2 * limit else peak  # far too large: the compiler refuses and names no peak

    found = largest_that_fits(peak_of, limit, start)
    fits = lambda rows: fixed + row * rows + 0.3 * row * (rows % 3) <= limit
    assert (found == 0 or fits(found)) and not fits(found + 1)
    assert abs(found - want) <= 1 and len(asked) == len(set(asked)) <= 6


@pytest.mark.parametrize("start", [4, 37, 40, 200])
@pytest.mark.parametrize("slope", [-1, 0, 1])
def test_the_largest_batch_is_found_where_memory_is_flat(start, slope):
    """As compiled for a v6e: up to 37 rows a line, then the compiler makes do with what there is, to the 78th."""
    asked = []

    def peak_of(rows):
        asked.append(rows)
        if rows > 78:
            return None
        return 3_800 + 740 * rows if rows < 37 else 31_200 + slope * (rows - 37)

    assert largest_that_fits(peak_of, 33_554, start) == 78
    assert len(asked) == len(set(asked)) <= 11 and max(asked) <= 200
    assert sum(rows <= 78 for rows in asked) <= 7  # each is a minute and a half


@pytest.fixture
def quick_compiler():
    """Programs that are only looked at compile twice as fast with little optimization."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_a_config_too_large_is_refused_with_the_nearest_that_fits(monkeypatch, quick_compiler):
    """One line: what it needs, what there is, and a divisor of the batch that was compiled and fits."""
    mesh = train.make_mesh(jax.devices()[:1])
    peaks = {
        rows: train.measure_fit(dataclasses.replace(TINY, device_batch_size=rows), mesh).peak_bytes
        for rows in (6, 4, 3)
    }
    assert peaks[6] > peaks[4] > peaks[3]
    monkeypatch.setattr(chip, "memory_limit", lambda device: peaks[4] + 1)
    with pytest.raises(train.DoesNotFit) as refusal:
        train.preflight(TINY)
    message = str(refusal.value)
    assert f"device_batch_size=6: a step needs {peaks[6] / GIB:.3g} GiB" in message and "\n" not in message
    assert f"; device_batch_size=4 fits, with {peaks[4] / GIB:.3g} GiB" in message
    monkeypatch.setattr(chip, "memory_limit", lambda device: 1)
    with pytest.raises(train.DoesNotFit, match="no smaller batch or model of this shape fits"):
        train.preflight(TINY)


def test_a_refusal_where_the_memory_is_unknown_is_one_line_too():
    """The compiler refuses what no v4 takes, and nobody told us what a v4 has."""
    refused = Fit("1 x TPU v4", 40 * GIB, None, {"activations": 0}, 1.0, None, None, 1.0, None)
    measure = lambda config: refused._replace(peak_bytes=3 * GIB, compiled="yes")
    line = explain_refusal(TINY, refused, lambda config: 10, measure, 1)
    assert line == (
        "device_batch_size=6: a step needs at least 40 GiB of what there is on 1 x TPU v4; "
        "device_batch_size=4 fits, with 3 GiB"
    )


def test_smaller_configs_keep_the_batch_and_then_shrink_the_model():
    """Divisors of the batch per device first, so that training is the same; then heads that make whole layers."""
    smaller = list(smaller_configs(TINY, 1))
    assert [c.device_batch_size for c in smaller[:4]] == [4, 3, 2, 1]
    assert all(c.total_batch_size == 12 for c in smaller)
    assert [(c.n_head, c.n_kv_head) for c in smaller[4:]] == [(3, 1)]  # no other number of heads makes whole layers
    assert [c.device_batch_size for c in smaller_configs(TINY, 2)][:3] == [3, 2, 1]


def test_the_largest_batch_of_a_real_step(quick_compiler):
    """By compiling: the answer fits this machine's limit, one more does not."""
    mesh = train.make_mesh(jax.devices()[:1])
    measure = lambda config: train.measure_fit(config, mesh)
    limit = measure(dataclasses.replace(TINY, device_batch_size=9, total_batch_size=9)).peak_bytes
    limited = lambda config: measure(config)._replace(limit_bytes=limit)
    assert find_largest_batch(TINY, limited(TINY), 1, limited, TINY.device_batch_size) == 9


def test_the_preflight_of_a_machine_comes_before_any_data(tmp_path):
    """A config for which no laptop is enough is refused in one line, and no shard, tokenizer or run was made before."""
    flags = "--preset chip --attn_impl einsum --aspect_ratio 512 --seq_len 16384 --device_batch_size 8 --data offline"
    command = [sys.executable, str(ROOT / "02_train.py"), *flags.split()]
    environment = os.environ | {"ONECHIP_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert float(re.search(r"a step needs ([\d.]+) GiB of the .* GiB of 1 x cpu", line)[1]) > 128
    assert "data:" not in done.stdout.replace("; data: offline", "")
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.glob("home/[!c]*"))  # but for home/compiled


def test_microbatches_that_divide_the_batch_are_compared():
    """1, 2, 4, 8 and 16 sequences at a time, where the batch per device has them whole and the step fits.

    What is known of the config itself is not compiled again; the fastest is named, and so is the largest batch.
    """
    asked = []

    def measure(config):
        rows = config.device_batch_size
        asked.append((rows, config.total_batch_size))
        return Fit("", 2**30 * rows, 7 * 2**30, {}, 1.0, 1.0, 1 / 64 if rows == 2 else 1 / rows, 1.0, "compiled")

    config = dataclasses.replace(TINY, total_batch_size=48, device_batch_size=4)
    fit = measure(config)
    assert [rows for rows, _ in compare_microbatches(config, fit, 2, measure)] == [1, 2, 4]
    assert asked == [(4, 48), (1, 48), (2, 48), (8, 48)]
    asked.clear()
    lines = list(look_further(config, fit, 2, measure, None))
    assert asked[:4] == [(1, 48), (2, 48), (8, 48), (7, 14)]  # the search begins where the comparison points
    assert [line.split(":")[0] for line in lines[:3]] == [f"  device_batch_size  {rows}" for rows in (1, 2, 4)]
    assert lines[3] == "  fastest by estimate: --device_batch_size 2"
    assert lines[4].startswith("  looking for the largest device_batch_size: ")  # before it takes its time
    assert lines[5:] == ["  largest device_batch_size: 7, without accumulation"]
    assert len(list(look_further(config, fit._replace(step_seconds=None), 2, measure, None))) == 2
    unknown = fit._replace(step_seconds=None, limit_bytes=None, where="1 x TPU v4")
    assert list(look_further(config, unknown, 2, measure, None)) == [
        "  largest device_batch_size: unknown, as the memory of 1 x TPU v4 is"
    ]


def test_the_preflight_command_tells_and_ends(tmp_path):
    """One command says what a step needs and what the largest batch is; nothing is downloaded, trained or left."""
    flags = "--preflight here --n_head 2 --head_dim 16 --aspect_ratio 32 --seq_len 4096 --vocab_size 64 --loss_slice 64"
    flags += " --device_batch_size 2 --total_batch_size 2"
    command = [sys.executable, str(ROOT / "02_train.py"), *flags.split()]
    environment = os.environ | {"ONECHIP_HOME": str(tmp_path / "home"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # which would be used instead
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "step compiled for 1 x cpu" in done.stdout and "parameters " in done.stdout
    assert re.search(r"largest device_batch_size: \d+, without accumulation", done.stdout)
    kept = list((tmp_path / "home" / "compiled").iterdir())
    assert any("train_step" in entry.name for entry in kept)  # a second start reads them from there
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------------------
# Programs for a v6e, compiled on this machine


def needs_libtpu():
    pytest.importorskip("libtpu", reason="compiling for v6e needs libtpu: jax[tpu]")


def test_a_compiler_without_a_chip_is_quiet():
    """libtpu asks for the type of the TPU and its hosts, and complains at length where nobody says."""
    needs_libtpu()
    code = 'import importlib; train = importlib.import_module("02_train"); print(train.chip_mesh("v5e:2x4").size)'
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")


@pytest.fixture(scope="module")
def on_v6e():
    needs_libtpu()
    return train.chip_mesh("v6e:1x1")


def count_kernels(compiled):
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.slow
@pytest.mark.parametrize("impl, kernels_per_layer", [("splash", 3), ("pallas", 2), ("einsum", 0), ("jax", 0)])
def test_a_v6e_program_has_the_kernels_its_attention_promises(impl, kernels_per_layer, on_v6e):
    """A kernel interpreted in a chip's program would be a thousand times slower, an undonated state twice as large."""
    fit = train.measure_fit(dataclasses.replace(CHIP, attn_impl=impl), on_v6e)
    assert count_kernels(fit.compiled) == kernels_per_layer * CHIP.n_layer == kernels_per_layer * 2
    memory, state = fit.compiled.memory_analysis(), 12 * train.count_params(CHIP)["total"]
    assert memory.alias_size_in_bytes >= state  # donated
    assert memory.temp_size_in_bytes < 8 * 2**20  # 4.7 to 6.3 MiB on jax 0.7.2 to 0.12
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert state < kept < 1.1 * state
    assert kept + memory.temp_size_in_bytes <= fit.peak_bytes < 1.1 * state + 48 * 2**20  # 30 MiB of it: the program
    assert fit.fits
    assert fit.limit_bytes == int(31.25 * 2**30)


# GiB that one layer of each preset may take; the chip's is below, with all its layers.
BOUNDS = {"gpu": 7.0, "laptop": 0.2}


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(train.PRESETS.keys() - {"chip"}))
def test_every_preset_compiles_for_a_v6e(preset, on_v6e):
    """One layer and two microbatches of each: a change that breaks the chip, or takes twice the memory, fails here."""
    whole = train.Config(**train.PRESETS[preset])
    config = dataclasses.replace(whole, aspect_ratio=whole.n_embd, total_batch_size=2 * whole.device_batch_size)
    fit = train.measure_fit(config, on_v6e)
    assert 12 * train.count_params(config)["total"] < fit.peak_bytes < BOUNDS[preset] * GIB
    assert count_kernels(fit.compiled) == (2 if whole.attn_impl == "pallas" else 0)
    assert fit.step_seconds > 0


@pytest.mark.slow
def test_the_default_model_fits_a_v6e_with_room(on_v6e):
    """All 16 layers at 4 x 2048 tokens: under 7 GiB of 31.25, two kernels a layer, twice the plain design's speed."""
    config = dataclasses.replace(train.Config(**train.PRESETS["chip"]), total_batch_size=4)
    fit = train.measure_fit(config, on_v6e)
    assert count_kernels(fit.compiled) == 2 * 16
    assert fit.peak_bytes < 7 * GIB  # 17.4 in the plain design
    assert fit.bytes_per_token < 9e6  # 16.8e6
    assert 1e9 * fit.step_seconds / (4 * 2048) < 5290  # 10,580
    text = describe_fit(config, fit, train.peak_rate(config, on_v6e))
    assert " of 31.25 GiB: parameters 1, moments 2" in text and "compiler's estimate" in text


@pytest.mark.slow
def test_a_slice_and_a_v5e_compile_too():
    """Eight chips take an eighth of the batch each; a v5e has 15.75 GiB, and refuses what a v6e would take."""
    needs_libtpu()
    mesh = train.chip_mesh("v6e:2x4")
    assert mesh.size == 8
    fit = train.measure_fit(dataclasses.replace(CHIP, total_batch_size=16), mesh)
    assert "all-reduce" in fit.compiled.as_text() and fit.fits
    tables = {"vocab_size": 5 << 18, "seq_len": 256, "loss_slice": 256}  # 15 GiB of tables and moments
    large = train.Config(n_head=4, aspect_ratio=128, device_batch_size=1, total_batch_size=1, **tables)
    wanted = "GiB of the 15.75 GiB of 1 x TPU v5 lite; n_head=3, n_kv_head=3 fits, with"  # three layers for four
    with pytest.raises(train.DoesNotFit, match=wanted):
        train.preflight(large, "v5e:1x1")
    assert train.preflight(large, "v6e:1x1").fits


def test_a_topology_that_is_none_is_told_in_one_line():
    """A misspelt topology, or a machine without libtpu, is one line with the name and the remedy, not XLA's page."""
    with pytest.raises(UserError, match="topology='v6e-1'") as caught:
        train.chip_mesh("v6e-1")
    assert "\n" not in str(caught.value) and "jax[tpu]" in str(caught.value)
