"""What a check of a chip measures and how large, by the platform: chosen once, at the start."""

import dataclasses

from onechip.check_compare import Case

QUICK, ALL = (), (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a check. microbatches: sequences at a time that steps are timed with; (): each subject's own.

    tokens, channels, vocabulary: of the loss and smaller pieces; cases, attentions: what attention is compared at;
    product: side of a matrix; bytes in bytes; inner: calls queued at once; budget: seconds in all, with compiled
    programs kept and without.
    """

    preset: str
    attentions: tuple
    cases: tuple
    tokens: int = 2048
    channels: int = 768
    vocabulary: int = 32768
    matrices: tuple = ((768, 768), (768, 3072))
    product: int = 8192
    copy_bytes: int = 1 << 30
    host_bytes: int = 1 << 28
    prompt: int = 1024
    new_tokens: int = 128
    runs: int = 5
    inner: int = 10
    steps: int = 20
    microbatches: tuple = QUICK
    budget: tuple = (300.0, 720.0)


# 2,048 tokens: heads of 128 and 256, all keys and a window, heads that share keys; values with gated rows.
QUICK_CASES = (
    Case(2048, 6, 6, 128, 2048), Case(2048, 6, 2, 128, 1024), Case(2048, 6, 6, 128, 513, gated=True),
    Case(2048, 4, 2, 256, 2048), Case(2048, 4, 4, 256, 1024),
)  # fmt: skip
ALL_CASES = tuple(
    dict.fromkeys(
        [
            *QUICK_CASES,
            *(
                Case(2048, N, K, H, window, gated)
                for N, K, H in ((6, 6, 128), (6, 2, 128), (4, 4, 256), (4, 2, 256))
                for window in (2048, 1024, 513)
                for gated in (False, True)
            ),
        ]
    )
)
EVERY = ("einsum", "jax", "splash", "pallas")
CHIP = Sizes("chip", EVERY, QUICK_CASES)
GPU = Sizes("gpu", EVERY[:2], QUICK_CASES)  # the kernels are a TPU's
# A laptop: the same code at the size of a test, kernels interpreted.
TINY = Sizes(
    "laptop", EVERY, (Case(128, 2, 1, 128, 128), Case(128, 2, 2, 128, 50, gated=True)), tokens=128, channels=128,
    vocabulary=256, matrices=((48, 80),), product=512, copy_bytes=1 << 24, host_bytes=1 << 24, prompt=16, new_tokens=16,
    runs=3, inner=2, steps=4,
)  # fmt: skip
BY_PLATFORM = {"tpu": CHIP, "cpu": TINY}


def sizes_for(platform, everything=False):
    """The Sizes of a check on a platform as jax calls it; everything: all cases and microbatches, with no budget."""
    sizes = BY_PLATFORM.get(platform, GPU)
    if not everything:
        return sizes
    endless = (float("inf"),) * 2
    cases = sizes.cases if sizes is TINY else ALL_CASES
    return dataclasses.replace(sizes, cases=cases, microbatches=(1, 2) if sizes is TINY else ALL, budget=endless)
