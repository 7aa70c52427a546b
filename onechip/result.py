"""What a training leaves with who called it."""

from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    """What `train` returns. params is the trained pytree on the device; the losses are of the last evaluation."""

    params: dict
    step: int
    val_loss: float | None
    val_bpb: float | None
    gzip_bpb: float | None
    samples: list
    run_dir: Path
