"""onechip/stages.py: what a run of several stages is, what it trains on, and what is refused."""

import importlib

import pytest

from onechip.errors import UserError
from onechip.stages import count_tokens, stages_of

train = importlib.import_module("02_train")
speed = importlib.import_module("05_speedrun")

TINY = {
    "n_head": 2, "head_dim": 8, "aspect_ratio": 8, "vocab_size": 31, "seq_len": 48, "attn_impl": "einsum",
    "dtype": "float32", "device_batch_size": 6, "total_batch_size": 36, "num_iterations": 100,
}  # fmt: skip


def test_a_run_without_stages_is_one_of_its_own():
    """One stage to the last step, with the very config; its tokens are steps times rows times length."""
    config = train.Config(**TINY)
    assert stages_of(config) == [(100, config)]
    assert count_tokens(config) == 100 * 36 * 48


def test_stages_have_their_own_batches_and_all_else_of_the_run():
    """Rows and length as written; microbatches of as many tokens, where that divides; everything else unchanged."""
    config = train.Config(**TINY, stages="10:8x12 30:20x24 55:30x48")
    stages = stages_of(config)
    assert [end for end, _ in stages] == [10, 30, 55, 100]
    batches = [(c.total_batch_size, c.seq_len, c.device_batch_size) for _, c in stages]
    assert batches == [(8, 12, 8), (20, 24, 4), (30, 48, 6), (36, 48, 6)]
    assert {c.stages for _, c in stages} == {""} and {c.num_iterations for _, c in stages} == {100}
    assert stages[-1].config == train.Config(**TINY)
    assert count_tokens(config) == 10 * 8 * 12 + 20 * 20 * 24 + 25 * 30 * 48 + 45 * 36 * 48


def test_muons_rates_follow_the_batch_of_each_stage():
    """By the square root of the tokens in a step, in 05's Config too, whose other sizes stay as the depth has them."""
    from onechip.doors import config_with

    config = config_with(speed.Config, speed.MuonSettings)(depth=12, num_iterations=3000, stages="500:128x1024")
    early, late = (stage.config for stage in stages_of(config))
    assert (early.n_embd, early.n_kv_head, early.num_iterations) == (late.n_embd, late.n_kv_head, 3000)
    tokens = [c.total_batch_size * c.seq_len for c in (early, late)]
    ratio = speed.group_rate(early, None) / speed.group_rate(late, None)
    assert ratio == pytest.approx((tokens[0] / tokens[1]) ** 0.5) and tokens == [2**17, 2**19]


@pytest.mark.parametrize(
    "stages, said",
    [
        ("10", "write STEPS:ROWSxTOKENS for each stage, such as '500:128x512 1000:256x1024'"),
        ("10:8x12,30:20x24", "write STEPS:ROWSxTOKENS for each stage, such as '500:128x512 1000:256x1024'"),
        ("0:8x12", "write STEPS:ROWSxTOKENS for each stage, such as '500:128x512 1000:256x1024'"),
        ("30:8x12 30:20x24", "each stage must end at a later step than the one before: [30, 30]"),
        ("100:8x12", "a stage ends at step 100, and the run at num_iterations=100: leave steps for the whole batch"),
        ("10:8x96", "96 tokens are more than seq_len=48"),
        ("10:8x1", "seq_len=1: must be at least 2"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(stages, said):
    """One line with the field, its value and what would be right; a schedule that never ends among them."""
    with pytest.raises(UserError) as refusal:
        train.Config(**TINY, stages=stages)
    assert str(refusal.value) == f"stages={stages!r}: {said}"
