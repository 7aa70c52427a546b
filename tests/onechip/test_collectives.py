"""onechip/collectives.py: bytes between devices, by kind, from a compiled program's text."""

import pytest

from onechip.collectives import devices_in, seconds_of, sent_by, traffic

# As the TPU's compiler writes it: a gather taken apart into pieces in a loop that runs 5 times; a sum of which each
# device takes its share.
HLO = """
%pieces.1 (a: bf16[3,8]) -> (bf16[24,8]) {
  %g.1 = bf16[24,8]{1,0} all-gather(%a), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%async_collective_fusion.2 (a: bf16[3,8]) -> (bf16[24,8]) {
  %g.2 = bf16[24,8]{1,0} all-gather(%a), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%ends.1 (a: bf16[3,8]) -> bf16[24,8] {
  %g.3 = bf16[24,8]{1,0} all-gather(%a), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%all-reduce-scatter.1 (a: f32[16,10]) -> f32[4,10] {
  %r.1 = f32[16,10]{1,0} all-reduce(%a), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%add
  %d.1 = f32[4,10]{1,0} dynamic-slice(%r.1, %i, %z), dynamic_slice_sizes={4,10}
}

%body.1 (p: (s32[])) -> (s32[]) {
  %async-collective-start.1 = (bf16[3,8]{1,0}, bf16[24,8]{1,0}) fusion(%a), kind=kCustom, calls=%pieces.1
  %fusion.7 = (bf16[24,8]{1,0}, f32[5]{0}) fusion(%b), kind=kOutput, calls=%async_collective_fusion.2
  %async-collective-done.1 = bf16[24,8]{1,0} fusion(%c), kind=kCustom, calls=%ends.1
  %s.1 = bf16[2,9]{1,0} reduce-scatter(%x), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

%condition.1 (p: (s32[])) -> pred[] {
  %n.1 = s32[] constant(5)
}

ENTRY %main.1 (a: f32[7]) -> f32[7] {
  %w.1 = (s32[]) while(%t), condition=%condition.1, body=%body.1
  %fusion.9 = f32[4,10]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %x.1 = f32[6,11]{1,0} all-to-all(%z), channel_id=3, replica_groups={{0,1,2}}, dimensions={0}
}
"""


def test_bytes_by_kind_hidden_and_waited_for():
    """A gather counts once, where it starts, and as hidden; loops as often as they run; a sum in shares half a sum."""
    want = {
        "all-gather": (5 * 7 / 8 * 24 * 8 * 2, 0),
        "reduce-scatter": (0, 5 * 1 * 18 * 2 + 2 * 3 / 4 * 160 * 4 / 2),
        "all-to-all": (0, 2 / 3 * 66 * 4),
    }
    found = traffic(HLO, 8)
    assert set(found) == set(want) and all(found[kind] == pytest.approx(want[kind]) for kind in want)
    hidden, waited = seconds_of(traffic(HLO, 8), 1e3)
    assert hidden == pytest.approx(want["all-gather"][0] / 1e3)
    assert waited == pytest.approx((want["reduce-scatter"][1] + want["all-to-all"][1]) / 1e3)


def test_a_program_without_collectives_sends_nothing():
    """Nor do lines that only name one."""
    assert traffic("ENTRY %m.1 (a: f32[7]) -> f32[7] {\n  %a.1 = f32[7]{0} add(%all-reduce.3, %b)\n}\n", 8) == {}


def test_what_is_started_has_its_results_behind_its_operands():
    """all-gather-start's second array, all-reduce-start's only one; without groups all devices take part."""
    started = "  %g = (bf16[3,8]{1,0}, bf16[24,8]{1,0}) all-gather-start(%a), dimensions={0}"
    assert sent_by(started, 8) == ("all-gather", 7 / 8 * 24 * 8 * 2, True)
    assert sent_by("  %r = f32[20]{0} all-reduce-start(%a), replica_groups={{0,1}}", 8) == ("all-reduce", 80, True)
    assert sent_by("  %d = bf16[24,8]{1,0} all-gather-done(%g)", 8) is None
    assert devices_in("all-reduce(%a), replica_groups=[4,2]<=[8]", 8) == 2 and devices_in("all-reduce(%a)", 8) == 8
