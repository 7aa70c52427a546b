"""An engine in its own thread: many clients at once, those that leave, and what an error of the engine does."""

import threading

import pytest
from configs import quick_compiler  # noqa: F401  (a fixture for every test)
from writers import GPT, ask, make_engine, random_prompt

from onechip.enginethread import EngineThread
from onechip.errors import UserError

pytestmark = pytest.mark.usefixtures("in_time")


@pytest.fixture(scope="module")
def engine():
    """Two rows; its programs are compiled."""
    engine = make_engine(rows=2, at_once=3)
    engine.generate_all([ask(random_prompt(GPT, 3 + n), 4) for n in range(3)])
    return engine


def test_many_clients_are_served_at_once(engine):
    """Nine threads on two rows: each gets what it gets alone, in several pieces."""
    requests = [ask(random_prompt(GPT, 2 + n), 12 + n, temperature=n % 2, seed=n) for n in range(9)]
    want, found = [answer.tokens for answer in engine.generate_all(requests)], {}

    def client(i):
        found[i] = list(writer.stream(requests[i]))

    with EngineThread(engine) as writer:
        threads = [threading.Thread(target=client, args=(i,)) for i in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [sum(found[i], []) for i in range(9)] == want and all(len(pieces) > 3 for pieces in found.values())


def test_a_client_that_leaves_frees_its_row(engine):
    """Two leave after their first tokens; two more are served, though each had asked for 60."""
    with EngineThread(engine) as writer:
        for n in range(2):
            stream = writer.stream(ask(random_prompt(GPT, 4 + n), 60))
            assert next(stream)
            stream.close()
        assert len(sum(writer.stream(ask(random_prompt(GPT, 9), 6)), [])) == 6
        cancelled = writer.submit(ask(random_prompt(GPT, 5), 60))
        cancelled.cancel()
        assert cancelled.wait(10) and cancelled.reason == "cancelled"


def test_a_closed_engine_ends_what_is_left_and_takes_nothing_more(engine):
    """Answers end as cancelled; a request is refused in one line, and `close` may be called again."""
    writer = EngineThread(engine)
    answers = [writer.submit(ask(random_prompt(GPT, 5), 60)) for _ in range(5)]
    writer.close()
    assert all(answer.wait(0) and answer.reason in ("cancelled", "length") for answer in answers)
    assert any(answer.reason == "cancelled" for answer in answers)
    with pytest.raises(UserError, match="the engine has stopped: it was closed"):
        writer.submit(ask([1], 2))
    writer.close()


def test_an_error_of_the_engine_reaches_every_client(engine, monkeypatch):
    """Those that wait as well; later requests are told what it was."""

    def fail(*_):
        raise MemoryError("no room on the device")

    monkeypatch.setattr(engine.programs, "write", fail)
    with EngineThread(engine) as writer:
        with pytest.raises(MemoryError, match="no room"):
            list(writer.stream(ask([1, 2], 20)))
        with pytest.raises(UserError, match="no room on the device"):
            writer.submit(ask([1], 2))
