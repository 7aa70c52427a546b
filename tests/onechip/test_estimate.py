"""onechip/estimate.py: bytes and cycles of a step, by arithmetic and from a compiled program's text."""

import dataclasses
import importlib
from types import SimpleNamespace

import numpy as np
import pytest

from onechip.estimate import (
    bytes_needed,
    kernel_cycles,
    least_bytes,
    memory_parts,
    row_cycles,
    step_seconds,
    xla_cycles,
)

train = importlib.import_module("02_train")
speed = importlib.import_module("05_speedrun")

TINY = train.Config(
    n_head=6, n_kv_head=2, head_dim=14, aspect_ratio=42, vocab_size=31, seq_len=18, attn_impl="einsum", dtype="float32",
    device_batch_size=6, total_batch_size=12, loss_slice=13,
)  # fmt: skip
CHIP = train.Config(
    n_head=2, n_kv_head=1, head_dim=128, aspect_ratio=128, vocab_size=1024, seq_len=512, device_batch_size=2,
    total_batch_size=4, window_pattern="S",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# Memory


def test_memory_parts_sum_to_the_peak():
    """Parameters as stored, float32 gradients, optimizer, bfloat16 weights if computed in that, a slice of logits."""
    parts = memory_parts(CHIP, {"params": 3000, "held": 1000, "param_bytes": 3210, "state_bytes": 7890}, 50_000_000)
    logits = 2 * 512 * 1024 * 2  # 1,024 tokens at a time, fewer than a slice
    assert parts["parameters"] == 3210 and parts["optimizer"] == 7890 and parts["gradients"] == 4000
    assert parts["bfloat16 weights"] == 2000 and parts["logits"] == logits
    assert sum(parts.values()) == 50_000_000
    single = memory_parts(TINY, {"params": 3000, "held": 1000, "param_bytes": 4000, "state_bytes": 8000}, 50_000_000)
    assert "bfloat16 weights" not in single and single["logits"] == 13 * 31 * 4


def test_the_least_that_a_step_needs_is_counted_by_arithmetic():
    """What stays, the input of each layer, and the larger of a slice's logits and an eighth of the scores."""
    count = {"params": 3000, "held": 1000, "param_bytes": 3210, "state_bytes": 7890}
    inputs, scores = 6 * 18 * 2 * 84, 6 * 6 * 18 * 18 // 8
    assert scores > 13 * 31  # logits of a slice
    assert least_bytes(TINY, count) == 3210 + 7890 + 4 * (inputs + scores)
    large = dataclasses.replace(TINY, vocab_size=310)
    assert least_bytes(large, count) == 3210 + 7890 + 4 * (inputs + 13 * 310)
    inputs, logits = 2 * 512 * 2 * 256, 2 * 512 * 1024
    assert least_bytes(CHIP, count) == 3210 + 7890 + 2 * (inputs + logits)  # pallas writes no scores down


@pytest.mark.parametrize(
    "text, size",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 45.22G of 31.25G hbm.", 45.22),
        ("RESOURCE_EXHAUSTED: the total memory for HLO temporaries (19.97G) exceeds HBM (15.75G).", 19.97),
        ("INVALID_ARGUMENT: 45.22G of something", None),
    ],
)
def test_an_error_of_the_compiler_is_read(text, size):
    """The largest size in an out-of-memory error is what was needed; other errors are not swallowed."""
    needed = bytes_needed(RuntimeError(text))
    assert needed == (size and int(size * 2**30))


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
    """A loop counts as often as it runs, what is inside a fusion does not count, 2 ** 63 - 1 means no estimate.

    Not every loop has its number of runs written on it: it is then in its condition.
    """
    assert xla_cycles(HLO) == 7 + 16 * (100 + 3 * 5)
    assert xla_cycles("HloModule none\n\nENTRY %m (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n") == 0


def test_lookups_and_row_sums_are_counted_by_their_bundles():
    """The compiler estimates neither: 96 rows of 1,280 channels read, 512 rows of 10 x 128 added; others are not."""
    gather = "  %gather_fusion.3 = bf16[96,1280]{1,0:T(8,128)(2,1)} fusion(%a, %b), kind=kCustom, calls=%c"
    add = (
        "  %add_rows.8 = f32[777,10,128]{2,1,0} custom-call(%a, %b, /*index=5*/%c), "
        'custom_call_target="tpu_custom_call", operand_layout_constraints={s32[512]{0}, s32[2]{0}, s32[2,256,1]{2,1,0}}'
    )
    assert row_cycles(gather) == round(96 * (7.5 + 10 * 0.72))
    assert row_cycles(add) == round(2 * 218 * 10 + 0.6 * 512 * (39 + 2 * 10 * 512 / 937))
    assert row_cycles('  %k.1 = f32[8] custom-call(%p), custom_call_target="tpu_custom_call"') == 0
    lines = HLO.replace("  %k.1", add + "\n" + gather + "\n  %k.1")
    assert xla_cycles(lines) == xla_cycles(HLO) + row_cycles(gather) + row_cycles(add)


def test_what_goes_between_devices_takes_what_the_links_need():
    """Sums of 61 float32 and 7 bfloat16, and in a loop that runs 16 times of 20; a single chip has none."""
    sums = (
        "  %all-reduce.5 = (f32[6,10]{1,0:T(8,128)}, bf16[7]{0}, /*index=2*/f32[]) all-reduce(%a, %b, %c), channel_id=1"
    )
    looped = "  %s.1 = f32[20]{0} all-reduce(%a), channel_id=2"
    hlo = HLO.replace("  %k.1", sums + "\n  %k.1").replace("  %b.1", looped + "\n  %b.1")
    config, seconds = train.Config(total_batch_size=64), {}
    for devices in (1, 8):
        device = SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
        mesh = SimpleNamespace(size=devices, devices=np.array([device] * devices))
        alone, with_sums = (step_seconds(config, SimpleNamespace(as_text=lambda t=t: t), mesh) for t in (HLO, hlo))
        seconds[devices] = with_sums - alone
    assert seconds[1] == 0 and seconds[8] == pytest.approx(2 * 7 / 8 * (4 * 61 + 2 * 7 + 16 * 80) / 180e9)


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


def test_kernels_that_add_to_the_values_take_longer():
    """By four blocks in each layer that has value embeddings: of three layers the first and the last."""
    fields = {"depth": 3, "n_embd": 256, "total_batch_size": 2, "num_iterations": 1}
    gated, plain = (speed.Config(**fields, value_embeds=on) for on in (True, False))
    assert gated.gated_layers == (True, False, True) and plain.gated_layers == (False,) * 3
    assert kernel_cycles(gated, 5) - kernel_cycles(plain, 5) == 5 * 2 * 2 * 4 * (35 + 115)


def test_a_device_runs_the_kernels_of_its_own_share_of_the_batch():
    """XLA's cycles are of one device's program, and so are the kernels'; no clock, no estimate."""

    def mesh(devices, kind="TPU v6 lite"):
        device = SimpleNamespace(platform="tpu", device_kind=kind)
        return SimpleNamespace(size=devices, devices=np.array([device] * devices))

    compiled, config = SimpleNamespace(as_text=lambda: HLO), train.Config(total_batch_size=64)
    cycles = 7 + 16 * (100 + 3 * 5)
    for devices in (1, 8):
        seconds = (cycles + kernel_cycles(config, 64 // devices)) / 1.75e9
        assert step_seconds(config, compiled, mesh(devices)) == pytest.approx(seconds)
    assert step_seconds(config, compiled, mesh(1, "TPU v4")) is None
    unknown = train.Config(n_head=2, head_dim=384, aspect_ratio=384, seq_len=512)
    assert step_seconds(unknown, compiled, mesh(1)) is None
