"""Every test: no network beyond loopback, no file in the user's home, the repository's modules importable."""

import collections
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUPPORT = ROOT / "tests" / "support"
CHILD = SUPPORT / "child"
sys.path[:0] = [str(ROOT), str(SUPPORT), str(ROOT / "tests"), str(CHILD)]

# Kept by name: its finalizer removes the folder when the interpreter ends.
_scratch = tempfile.TemporaryDirectory(prefix="onechip-tests-", ignore_cleanup_errors=True)
os.environ["ONECHIP_HOME"] = os.path.join(_scratch.name, "onechip")
os.environ["HF_HOME"] = os.path.join(_scratch.name, "huggingface")
for name in list(os.environ):
    # A secret of the machine's user must not send a test to a real account, nor a proxy past the block.
    if name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY") or name.lower().endswith("_proxy"):
        del os.environ[name]

# Where a container forbids it, every process that is started here would compile its imports again: 4 s of a worker's.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHILD), os.environ.get("PYTHONPATH")]))

import offline  # noqa: E402, F401  (this process too)

import onechip  # noqa: E402, F401  (before jax)

# isort: split
from browser import browser  # noqa: E402, F401  (a fixture)
from compiled import compiled_folder, compiled_once  # noqa: E402, F401  (fixtures for all)
from corpus import corpus, straight, tokenizer  # noqa: E402, F401


def pytest_collection_modifyitems(items):
    """Files with the most slow tests go first: at the end one process would be alone with them."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def in_time():
    """A test that waits for ever fails after two minutes; none takes half of that, even beside other work."""

    def too_late(number, frame):
        raise TimeoutError("this test has waited for 120 s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def interruptible():
    """Ctrl-C and a closed terminal act, even where pytest was started in the background or by nohup."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert after == usual, "a handler was left behind"
