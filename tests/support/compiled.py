"""Compiled programs on disk: each call of train() jits its own functions, and finds those of the call before.

They are compiled with little optimization, which takes programs this small half the time.
"""

import contextlib

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def keeping_compiled(folder):
    """Keeps every compiled program in a folder, those of processes that are started here too."""
    cache = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in cache}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cache.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory):
    """Where a test process keeps them."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled_once(compiled_folder):
    """For files that train the same config again and again: 8 of 10 s less for the same program."""
    with keeping_compiled(compiled_folder):
        yield
