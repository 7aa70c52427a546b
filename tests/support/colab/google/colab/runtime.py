"""Giving the machine back: leaves a file where a test can see it."""

import os
from pathlib import Path


def unassign():
    Path(os.environ["COLAB_UNASSIGNED"]).touch()
