"""onechip/fit.py: refusals, microbatches, the largest batch. With a made-up compiler, then with real steps on a CPU."""

import dataclasses
import functools
import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from onechip.chips import GIB
from onechip.fit import (
    DoesNotFit,
    Workload,
    compare_microbatches,
    divisors,
    explore,
    find_largest_batch,
    measure,
    nearest_that_fits,
    peak_rate,
    require_fit,
    show,
    smaller_configs,
)
from onechip.fitreport import describe, describe_run
from onechip.largest import largest_that_fits

train = importlib.import_module("02_train")

ROOT = Path(__file__).resolve().parents[2]
TINY = train.Config(
    n_head=6, n_kv_head=2, head_dim=14, aspect_ratio=42, vocab_size=31, seq_len=18, attn_impl="einsum", dtype="float32",
    device_batch_size=6, total_batch_size=12, loss_slice=13,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Toy:
    """The least that fit.py needs to know about a model, with figures that make its tests easy to check by hand."""

    device_batch_size: int = 6
    total_batch_size: int = 12
    n_layer: int = 5
    seq_len: int = 64
    n_embd: int = 32
    n_head: int = 2
    vocab_size: int = 16
    loss_slice: int = 64
    num_iterations: int = 3600
    dtype: str = "float32"
    attn_impl: str = "einsum"
    remat: str = "none"

    def recomputing(self):
        return (dataclasses.replace(self, remat=name) for name in ("dots", "all") if self.remat == "none")

    def smaller_models(self):
        return (dataclasses.replace(self, n_layer=n) for n in range(self.n_layer - 1, 0, -1))


def toy_work(peak_of, *, limit=None, kind="TPU v6 lite", devices=1, seconds_of=None, params_of=None):
    """(Workload, list of the configs that it is asked to compile) with a compiler that answers at once.

    peak_of(config): bytes; from twice `limit`, or 32 GiB, on, the compiler refuses. limit: the device's memory, None
    for what is known of its kind. seconds_of(config): what the compiler estimates. params_of(config): parameters.
    """
    asked = []

    def lower(config):
        asked.append(config)
        peak, cycles = peak_of(config), round(1.75e9 * seconds_of(config)) if seconds_of else 0
        text = f'ENTRY %m (p: f32[]) -> f32[] {{\n  %a = f32[] add(%p), config={{"estimated_cycles":"{cycles}"}}\n}}\n'

        def compile():
            if peak >= 2 * (limit or 16 * GIB):
                raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Used {peak / GIB:.2f}G of {limit or 0} hbm")
            return SimpleNamespace(
                memory_analysis=lambda: SimpleNamespace(peak_memory_in_bytes=peak),
                cost_analysis=lambda: {"bytes accessed": 3e6 * config.device_batch_size * config.seq_len},
                as_text=lambda: text,
            )

        return SimpleNamespace(compile=compile)

    def count(config):
        params = params_of(config) if params_of else 10
        sizes = {"param_bytes": 4 * params // devices, "state_bytes": 8 * params // devices}
        return {"params": params, "held": params, "whole_bytes": 12 * params, **sizes}

    device = SimpleNamespace(platform="tpu", device_kind=kind, memory_stats=lambda: limit and {"bytes_limit": limit})
    shape = {"data": 1, "fsdp": devices}
    mesh = SimpleNamespace(size=devices, devices=np.array([device] * devices), shape=shape)
    return Workload(mesh, lower, count, lambda config: 2e9), asked


# ---------------------------------------------------------------------------------------------------------------
# One step


def test_a_fit_is_described_in_five_lines_and_a_run_in_one():
    """Where and how long, memory by part, a checkpoint, work, estimated time; what a run is of Colab's days."""
    work, _ = toy_work(lambda config: 3 * GIB, seconds_of=lambda config: 0.002, params_of=lambda config: GIB // 8)
    fit = measure(work, Toy())
    assert fit.fits
    peak = peak_rate(work, Toy())
    assert peak == 918e12 / 2e9
    first, *rest = describe(Toy(), fit, peak).splitlines()
    assert re.fullmatch(r"step compiled for 1 x TPU v6 lite in \d+ s", first)
    assert rest == [
        "  memory 3 of 31.25 GiB: parameters 0.5, optimizer 1, gradients 0.5, logits 3.81e-06, activations 1",
        "  a checkpoint has 1.61 GB; training pauses 1 s for it on a disk of 250 MB/s",
        "  work a token: 2 GFLOP, 3.0 MB moved",
        "  compiler's estimate: 2.0 ms a step, 384 thousand tok/s, MFU 83.7%, 3 GiB",
    ]
    [day] = describe_run(Toy(), [fit], [peak])
    assert day == "  the day: 3,600 steps, 0.00276 billion tokens in 0.0 h: 0% of a Colab session of 23 h"
    [day] = describe_run(Toy(num_iterations=10**8), [fit], [peak], 4.5)
    tokens, units = "100,000,000 steps, 76.8 billion tokens", "250 compute units at 4.5 an hour"
    assert day == f"  the day: {tokens} in 55.6 h: 3 Colab sessions of 23 h, {units}"
    unknown, _ = toy_work(lambda config: 3 * GIB, kind="TPU v4")
    fit = measure(unknown, Toy())
    assert fit.fits and peak_rate(unknown, Toy()) == 275e12 / 2e9
    assert len(describe(Toy(), fit, None).splitlines()) == 4 and describe_run(Toy(), [fit], [None]) == []


# ---------------------------------------------------------------------------------------------------------------
# A step that does not fit


def test_a_refusal_where_the_memory_is_unknown_has_one_line_too():
    """The compiler refuses what no v4 takes, and what a v4 has is not in the table."""
    work, asked = toy_work(lambda config: (40 if config.device_batch_size == 6 else 3) * GIB, kind="TPU v4")
    with pytest.raises(DoesNotFit) as refusal:
        require_fit(work, Toy())
    assert str(refusal.value) == (
        "device_batch_size=6: a step needs at least 40 GiB of what there is on 1 x TPU v4; "
        "device_batch_size=4 fits, with 3 GiB"
    )
    assert [config.device_batch_size for config in asked] == [6, 4]


def test_smaller_configs_keep_the_batch_and_then_shrink_the_model():
    """Divisors of the batch per device, then remat, so that training is the same; then heads that make whole layers."""
    smaller = list(smaller_configs(TINY, 1))
    assert [(c.device_batch_size, c.remat) for c in smaller[:4]] == [(4, "none"), (3, "none"), (2, "none"), (1, "none")]
    assert [(c.device_batch_size, c.remat) for c in smaller[4:6]] == [(1, "dots"), (1, "all")]
    assert all(c.total_batch_size == 12 for c in smaller) and all(c.n_head == 6 for c in smaller[:6])
    assert [(c.n_head, c.n_kv_head) for c in smaller[6:]] == [(3, 1)]  # no other number of heads makes whole layers
    assert smaller[6].device_batch_size == 1 and smaller[6].remat == "none"
    assert [c.remat for c in smaller_configs(dataclasses.replace(TINY, remat="dots"), 1)][3:5] == ["dots", "all"]
    assert [c.device_batch_size for c in smaller_configs(TINY, 2)][:3] == [3, 2, 1]


def test_a_candidate_that_cannot_fit_is_not_compiled():
    """Activations are scaled from the last refused config: 60 bytes of which 6 rows take 50, and 25 are there."""
    peak_of = lambda config: 10 * GIB + config.n_layer * config.device_batch_size * 50 * GIB / 30
    work, asked = toy_work(peak_of, limit=25 * GIB, params_of=lambda config: 10 * GIB // 12)
    fit = measure(work, Toy(device_batch_size=6))
    assert fit.compiled is None and not fit.fits  # twice what there is
    found, size = nearest_that_fits(work, Toy(device_batch_size=6), fit)
    assert (found.device_batch_size, found.n_layer) == (1, 5) and size.peak_bytes == pytest.approx(
        10 * GIB + 50 / 6 * GIB
    )
    assert [config.device_batch_size for config in asked[1:]] == [1]  # neither 4 nor 3 nor 2


def test_remat_is_proposed_where_no_batch_fits():
    """Activations of one sequence are too many, and a fifth of them are not: the model stays as it is."""
    share = {"none": 1.0, "dots": 0.5, "all": 0.2}
    peak_of = lambda config: (10 + 30 * config.device_batch_size * config.n_layer / 5 * share[config.remat]) * GIB
    work, _ = toy_work(peak_of, params_of=lambda config: 10 * GIB // 12)
    with pytest.raises(DoesNotFit, match="; device_batch_size=1, remat=dots fits, with 25 GiB"):
        require_fit(work, Toy(device_batch_size=6))


@pytest.mark.parametrize(
    "fields", [{"seq_len": 10**9}, {"seq_len": 10**9, "attn_impl": "pallas"}, {"vocab_size": 99_999_999_999_999}]
)
@pytest.mark.parametrize("kind, there", [("TPU v6 lite", "the 31.25 GiB of"), ("TPU v4", "what there is on")])
def test_what_arithmetic_rules_out_is_refused_at_once(fields, kind, there):
    """Tracing it would take minutes, so nothing is lowered: neither it nor a smaller config that cannot fit either."""
    config = Toy(n_embd=1024, **fields)
    work, asked = toy_work(lambda config: 0, kind=kind, params_of=lambda config: 1024 * config.vocab_size)
    with pytest.raises(DoesNotFit) as refusal:
        require_fit(work, config)
    pattern = rf"device_batch_size=6: a step needs at least [\d.e+]+ GiB of {there} 1 x {kind}; no smaller .* fits"
    assert re.fullmatch(pattern, str(refusal.value))
    assert asked == []


def test_what_arithmetic_rules_out_is_refused_with_the_nearest_that_fits():
    """Of a model of 70 layers, 9 layers at most are worth a try, and 7 fit."""
    peak_of = lambda config: (4 * config.n_layer + 3 * config.device_batch_size) * GIB
    work, asked = toy_work(peak_of, params_of=lambda config: config.n_layer * 3 * GIB // 12)
    with pytest.raises(DoesNotFit, match="at least 210 GiB .*; device_batch_size=1, n_layer=7 fits, with 31 GiB"):
        require_fit(work, Toy(n_layer=70))
    assert {(config.device_batch_size, config.n_layer) for config in asked} <= {(1, 10), (1, 9), (1, 8), (1, 7)}


@pytest.fixture(scope="module")
def tiny_work():
    """02's real step on one CPU device, each config compiled once, with little optimization: twice as fast."""
    work = train.workload(train.make_mesh(jax.devices()[:1]))

    @functools.cache
    def lower(config):
        return SimpleNamespace(compile=functools.cache(work.lower(config).compile))

    jax.config.update("jax_disable_most_optimizations", True)
    yield work._replace(lower=lower)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
def test_a_config_too_large_is_refused_with_the_nearest_that_fits(monkeypatch, tiny_work):
    """One line: what it needs, what there is, and a divisor of the batch that was compiled and fits."""
    peaks = {
        rows: measure(tiny_work, dataclasses.replace(TINY, device_batch_size=rows)).peak_bytes for rows in (6, 4, 3)
    }
    assert peaks[6] > peaks[4] > peaks[3]
    monkeypatch.setattr("onechip.fit.memory_limit", lambda device: peaks[4] + 1)
    with pytest.raises(DoesNotFit) as refusal:
        require_fit(tiny_work, TINY)
    message = str(refusal.value)
    assert f"device_batch_size=6: a step needs {peaks[6] / GIB:.3g} GiB" in message and "\n" not in message
    assert f"; device_batch_size=4 fits, with {peaks[4] / GIB:.3g} GiB" in message
    monkeypatch.setattr("onechip.fit.memory_limit", lambda device: 1)
    with pytest.raises(DoesNotFit, match="no smaller batch or model of this shape fits"):
        require_fit(tiny_work, TINY)


ABSURD = [
    {"seq_len": 1_000_000_000},
    {"vocab_size": 99_999_999_999_999},
    {"n_head": 10**9, "n_kv_head": 0, "aspect_ratio": 10**9},
    {"head_dim": 10**9, "aspect_ratio": 10**9},
]


@pytest.mark.parametrize("fields", ABSURD, ids=lambda fields: next(iter(fields)))
def test_absurd_sizes_of_a_real_model_are_refused_at_once(fields, tiny_work):
    """Counting them traces nothing of that size and overflows nowhere."""
    tiny_work = tiny_work._replace(lower=None)
    with pytest.raises(DoesNotFit, match="at least .* GiB of the .* of 1 x cpu; no smaller batch or model"):
        require_fit(tiny_work, dataclasses.replace(TINY, **fields))


def test_the_divisors_of_a_batch_are_found_without_counting_to_it():
    """Two billion rows: the largest divisors come first, at once; and all of a small number's are found."""
    config = dataclasses.replace(TINY, device_batch_size=2**31 - 2, total_batch_size=2**31 - 2)
    nearest = [smaller.device_batch_size for smaller in itertools.islice(smaller_configs(config, 1), 3)]
    assert nearest == [(2**31 - 2) // divisor for divisor in (2, 3, 6)]
    for number in (1, 2, 12, 36, 97):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.slow
def test_the_preflight_of_a_machine_comes_before_any_data(tmp_path):
    """A config for which no laptop is enough is refused in one line, before any shard, tokenizer or run is made."""
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


# ---------------------------------------------------------------------------------------------------------------
# Other batches


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


@pytest.mark.slow
def test_the_largest_batch_of_a_real_step(tiny_work):
    """By compiling: the answer fits this machine's limit, one more does not."""
    limit = measure(tiny_work, dataclasses.replace(TINY, device_batch_size=9, total_batch_size=9)).peak_bytes
    assert find_largest_batch(tiny_work, TINY, limit, TINY.device_batch_size) == 9


def test_microbatches_that_divide_the_batch_are_compared():
    """1, 2, 4, 8 and 16 sequences at a time, where the batch per device has them whole and the step fits.

    What is known of the config itself is not compiled again; the fastest is named, and so is the largest batch.
    """
    seconds_of = lambda config: 1 / 64 if config.device_batch_size == 2 else 1 / config.device_batch_size
    peak_of = lambda config: config.device_batch_size * GIB
    work, asked = toy_work(peak_of, limit=7 * GIB, devices=2, seconds_of=seconds_of)
    sizes = lambda: [(config.device_batch_size, config.total_batch_size) for config in asked]

    config = Toy(total_batch_size=48, device_batch_size=4)
    fit = measure(work, config)
    assert [rows for rows, _ in compare_microbatches(work, config, fit)] == [1, 2, 4]
    assert sizes() == [(4, 48), (1, 48), (2, 48), (8, 48)]
    asked.clear()
    lines = list(explore(work, config, fit))
    assert sizes()[:4] == [(1, 48), (2, 48), (8, 48), (7, 14)]  # the search begins where the comparison points
    assert [line.split(":")[0] for line in lines[:3]] == [f"  device_batch_size  {rows}" for rows in (1, 2, 4)]
    assert lines[3] == "  fastest by estimate: --device_batch_size 2"
    assert lines[4].startswith("  searching for the largest device_batch_size: ")  # before it takes its time
    assert lines[5:] == ["  largest device_batch_size: 7, without accumulation"]
    assert len(list(explore(work, config, fit._replace(step_seconds=None)))) == 2
    unknown = fit._replace(step_seconds=None, limit_bytes=None, where="1 x TPU v4")
    assert list(explore(work, config, unknown)) == [
        "  largest device_batch_size: unknown, as the memory of 1 x TPU v4 is"
    ]


@pytest.mark.slow
def test_the_preflight_command_reports_and_ends(tmp_path):
    """One command prints what a step needs and the largest batch; nothing is downloaded, trained or left."""
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


def test_the_least_split_that_fits_is_taken_and_said(capsys):
    """Of three meshes the first does not fit; what a checkpoint has is of all devices together."""
    works = [toy_work(lambda config, size=size: size * GIB, devices=8)[0] for size in (40, 20, 10)]
    for work, fsdp in zip(works, (1, 2, 4), strict=True):
        work.mesh.shape.update(data=8 // fsdp, fsdp=fsdp)
    config = Toy(total_batch_size=64)
    assert show(works, config) is works[1]
    said = capsys.readouterr().out
    assert said.startswith("mesh: data=4,fsdp=2, the least split that fits\n") and "memory 20 of 31.25 GiB" in said
    assert show(works[2:], config) is works[2]
    assert capsys.readouterr().out.startswith("mesh: data=2,fsdp=4\n")
    with pytest.raises(DoesNotFit, match="40 GiB"):
        show(works[:1], config)
