"""Colab's machine when a notebook opens: installs the packages that its image lacks and looks for the TPU."""

import importlib.metadata
import subprocess
import sys
from importlib.util import find_spec

from onechip.errors import say

# Each group is one call of pip, so that a package that cannot be installed takes no other group with it.
# First what encoding needs, then what looks at runs, then what serves a model on a page.
PACKAGES = (("tiktoken",), ("tensorboard", "xprof", "wandb", "sweeps"), ("starlette", "uvicorn"))


def install_missing(names):
    """Installs those packages in `names` that are missing; leaves every installed package at its version."""
    missing = [name for name in names if find_spec(name) is None]
    if not missing:
        return
    # Each installed version is a constraint, so that pip adds packages and replaces none.
    installed = "\n".join(f"{found.name}==={found.version}" for found in importlib.metadata.distributions())
    pip = [sys.executable, "-m", "pip", "install", "-q", "-c", "/dev/stdin", *missing]
    if subprocess.run(pip, input=installed, text=True).returncode:
        say(f"Continuing without {', '.join(missing)}: pip could not add them to what is installed.")


def prepare_colab():
    """Installs what the image lacks; says in four lines if JAX finds no TPU, and what to choose in the menu."""
    for names in PACKAGES:
        install_missing(names)
    import jax

    backend = jax.default_backend()
    if backend != "tpu":
        say("=" * 80)
        say(f"NO TPU: JAX found only {backend.upper()}.")
        say("Choose Runtime > Change runtime type > v6e-1 TPU, then Run all again. Continuing without one.")
        say("=" * 80)
