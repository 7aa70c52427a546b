"""Stages: a run that begins with fewer or shorter sequences than it ends with, each stage with its own Config.

Short sequences are cheaper, and small batches are enough while the loss falls fast (batch warm-up, sequence warm-up:
modded-nanogpt's records use both). A stage is written `STEPS:ROWSxTOKENS`: up to that step, so many sequences a step of
so many tokens. After the last stage come the config's own total_batch_size and seq_len.
"""

import dataclasses
import math
import re
from typing import NamedTuple

from onechip.errors import UserError, require

FORM = "write STEPS:ROWSxTOKENS for each stage, such as '500:128x512 1000:256x1024'"


class Stage(NamedTuple):
    """`config` holds up to step `end`, which does not belong to it; its own `stages` are empty."""

    end: int
    config: object


def parse_stages(text):
    """[(end, rows, tokens), ...] of a config's `stages`, ends ascending; UserError for another form."""
    found = []
    for word in text.split():
        match = re.fullmatch(r"([1-9]\d{0,9}):([1-9]\d{0,9})x([1-9]\d{0,9})", word)
        require(match, "stages", text, FORM)
        found.append(tuple(map(int, match.groups())))
    ends = [end for end, _, _ in found]
    ascending = all(a < b for a, b in zip(ends, ends[1:], strict=False))
    require(ascending, "stages", text, f"each stage must end at a later step than the one before: {ends}")
    return found


def stages_of(config):
    """The Stages of a training config, one or more, the last one with its own batch and context to its last step.

    A microbatch of shorter sequences has as many tokens as one of the config's own, where that divides the rows.
    UserError names `stages` and what of it cannot work.
    """
    text, steps, longest = getattr(config, "stages", ""), config.num_iterations, config.seq_len
    stages = []
    for end, rows, tokens in parse_stages(text):
        remedy = f"a stage ends at step {end}, and the run at num_iterations={steps}: leave steps for the whole batch"
        require(end < steps, "stages", text, remedy)
        require(tokens <= longest, "stages", text, f"{tokens} tokens are more than seq_len={longest}")
        fields = {"total_batch_size": rows, "seq_len": tokens, "stages": ""}
        fields["device_batch_size"] = math.gcd(rows, config.device_batch_size * max(1, longest // tokens))
        try:
            stages.append(Stage(end, dataclasses.replace(config, **fields)))
        except UserError as error:
            raise UserError(f"stages={text!r}: {error}") from None
    last = dataclasses.replace(config, stages="") if text else config
    return [*stages, Stage(steps, last)]


def count_tokens(config, step=None):
    """Tokens that a config trains on, in all its stages; up to a step, if one is given."""
    total, start = 0, 0
    for end, c in stages_of(config):
        end = end if step is None else min(end, step)
        total, start = total + (end - start) * c.total_batch_size * c.seq_len, end
    return total
