"""onechip/loader.py: batches prepared in a thread, in order, with nothing left behind."""

import gc
import itertools
import threading
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onechip.loader import PrefetchDataLoader


def wait_until(condition, seconds=10.0):
    """Polls; a loaded machine gets its time, a quick one does not wait."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


@pytest.fixture
def nothing_left():
    """Afterwards there is no loader thread and no device buffer that was not there before."""
    gc.collect()
    before = len(jax.live_arrays())
    yield
    assert loader_threads() == []
    gc.collect()
    assert len(jax.live_arrays()) == before


def test_order_is_kept_to_the_end(nothing_left):
    """Every item comes once, placed, with its own state; then StopIteration, again and again."""
    loader = PrefetchDataLoader(((i, f"state {i}") for i in range(50)), place=lambda i: 10 * i)
    assert list(loader) == [(10 * i, f"state {i}") for i in range(50)]
    assert next(loader, None) is None and next(loader, None) is None
    loader.close()
    with PrefetchDataLoader(iter([(1, 2)])) as loader:  # an iterator without close()
        assert list(loader) == [(1, 2)]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_it_works_ahead_to_its_depth(depth, nothing_left):
    """Before the first batch is asked for, `depth` wait and one more is prepared, placed too, and no further one."""
    placed = []
    with PrefetchDataLoader(((i, i) for i in itertools.count()), place=placed.append, depth=depth) as loader:
        wait_until(lambda: len(placed) == depth + 1)
        time.sleep(0.2)
        assert len(placed) == depth + 1
        next(loader)
        wait_until(lambda: len(placed) == depth + 2)
        time.sleep(0.2)
        assert len(placed) == depth + 2


def fail_deep_inside(i):
    raise LookupError(f"item {i} is broken")


def test_an_error_is_raised_at_once_with_its_traceback(nothing_left):
    """An error goes before the batches that wait, names the function that failed, and is not lost the second time."""

    def items():
        for i in range(2):
            yield jnp.full(3, i), i
        fail_deep_inside(2)

    loader = PrefetchDataLoader(items(), depth=2)
    wait_until(lambda: not loader_threads())
    for _ in range(2):
        with pytest.raises(LookupError, match="item 2 is broken") as caught:
            next(loader)
        assert "fail_deep_inside" in {frame.name for frame in traceback.extract_tb(caught.value.__traceback__)}
    loader.close()
    del loader, caught


def test_an_error_wakes_a_waiting_next(nothing_left):
    """A next() that waits is woken by an error in `place`, not left hanging."""

    def place(item):
        time.sleep(0.2)
        fail_deep_inside(item)

    with PrefetchDataLoader(((i, i) for i in itertools.count()), place) as loader:
        with pytest.raises(LookupError, match="item 0"):
            next(loader)


@pytest.mark.parametrize("depth", [1, 3])
def test_closing_a_full_queue_leaves_nothing(depth, nothing_left):
    """close() frees the batches that wait and the one in the worker's hands, ends the thread and the generator."""
    gc.collect()
    before, ended, made = len(jax.live_arrays()), [], []

    def items():
        try:
            for i in itertools.count():
                made.append(i)
                yield np.full(5, i), i
        finally:
            ended.append(threading.current_thread().name)

    loader = PrefetchDataLoader(items(), jax.device_put, depth=depth)
    wait_until(lambda: len(made) == depth + 1)
    wait_until(lambda: len(jax.live_arrays()) == before + depth + 1)
    loader.close()
    assert ended == ["loader"] and loader_threads() == []
    assert len(jax.live_arrays()) == before, "the closed loader itself holds on to a batch"
    assert next(loader, "end") == "end"
    loader.close()  # a second time does no harm


def test_closing_a_busy_worker_leaves_nothing(nothing_left):
    """Leaving the `with` block by an error, while a batch is being prepared, waits for it and drops it."""
    busy, made = threading.Event(), []

    def place(item):
        busy.set()
        time.sleep(0.3)
        made.append(item)
        return jax.device_put(item)

    with pytest.raises(ZeroDivisionError):
        with PrefetchDataLoader(((np.ones(4), i) for i in itertools.count()), place):
            busy.wait(10)
            raise ZeroDivisionError
    assert len(made) == 1 and loader_threads() == []
