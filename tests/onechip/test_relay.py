"""Places for answers and the line for them; events from an answer's thread to an event loop."""

import asyncio
import threading

import pytest
from scripted import ScriptedModel, endless

from onechip.relay import NoPlace, Places, Relay
from onechip.talker import TalkDone, Talker, TalkSettings, TextPiece, ToolCall, ToolOutput


def test_places_are_given_in_order():
    """Three wait for two places: they get them in the order in which they came, and a fourth is refused at once."""

    async def run():
        places, order = Places(2, 3), []
        await places.take(1)
        await places.take(1)

        async def ask(name):
            await places.take(5)
            order.append(name)

        tasks = [asyncio.create_task(ask(name)) for name in "abc"]
        await asyncio.sleep(0)
        with pytest.raises(NoPlace, match="line"):
            await places.take(5)
        for _ in range(3):
            places.free()
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(run()) == ["a", "b", "c"]


def test_who_leaves_the_line_costs_no_place():
    """One that waits too long, and one that is cancelled in the very moment of its turn, leave the place to others."""

    async def run():
        places = Places(1, 4)
        await places.take(1)
        with pytest.raises(NoPlace, match="within 0.02 s"):
            await places.take(0.02)
        late = asyncio.create_task(places.take(5))
        await asyncio.sleep(0)
        places.free()  # its turn comes
        late.cancel()  # and it leaves
        await asyncio.gather(late, return_exceptions=True)
        await places.take(0.02)  # the place is there
        with pytest.raises(NoPlace):
            await places.take(0.02)

    asyncio.run(run())


def collect(talker, cancel_after=None):
    """(batches of events, how often the end was reported) of one answer, cancelled after so many batches."""

    async def run():
        ends, batches = [], []
        relay = Relay(talker, "one two", TalkSettings(), lambda: ends.append(1))
        while not batches or not isinstance(batches[-1][-1], TalkDone):
            batches.append(await relay.take())
            if len(batches) == cancel_after:
                relay.cancel()
        relay.thread.join(5)
        await asyncio.sleep(0.01)
        return batches, len(ends)

    return asyncio.run(run())


def test_text_that_waits_is_one_piece():
    """A reader that comes late gets each event, text joined, in order; none is lost or swapped with a tool call."""

    def script(prompt):
        return [TextPiece("a"), TextPiece("b"), ToolCall("1"), ToolOutput("2"), TextPiece("c"), TextPiece("d")]

    batches, ends = collect(ScriptedModel(script).talker())
    flat, said = [event for batch in batches for event in batch], ""
    for event in flat:
        said += event.text if isinstance(event, TextPiece) else f"[{type(event).__name__}]"
    assert said == "ab[ToolCall][ToolOutput]cd[TalkDone]" and ends == 1


@pytest.mark.parametrize("pause", [0.0, 0.01])
def test_cancel_ends_a_talk(pause):
    """An endless answer ends soon after it is cancelled, by a TalkDone that says so; its place is free."""
    model = ScriptedModel(endless, pause=pause, context=10**9)
    batches, ends = collect(model.talker(), cancel_after=2)
    assert batches[-1][-1].reason == "cancelled" and ends == 1 and model.active == 0


def test_cancel_before_the_start_is_over():
    """An answer that is cancelled while its Talk is still being started ends as well."""
    model, may_start = ScriptedModel(endless, pause=0.01), threading.Event()

    def start(prompt, settings):
        may_start.wait(5)
        return model.start(prompt, settings)

    async def run():
        relay = Relay(Talker("slow", 99, 1, start), "x", TalkSettings(), lambda: None)
        relay.cancel()
        may_start.set()
        while True:
            events = await relay.take()
            if isinstance(events[-1], TalkDone):
                return events[-1].reason

    assert asyncio.run(run()) == "cancelled"


def test_what_fails_is_raised_after_what_came_before():
    """The text before a failure is delivered, then the failure; a Talk without its TalkDone fails too."""

    async def run(script):
        ends, got = [], []
        relay = Relay(ScriptedModel(script).talker(), "x", TalkSettings(), lambda: ends.append(1))
        with pytest.raises((KeyError, RuntimeError)):
            while True:
                got += await relay.take()
        relay.thread.join(5)
        await asyncio.sleep(0.01)
        return "".join(piece.text for piece in got), len(ends)

    assert asyncio.run(run(lambda prompt: [TextPiece("half"), KeyError("broken")])) == ("half", 1)

    async def unfinished():
        start = lambda prompt, settings: iter([TextPiece("half")])
        relay = Relay(Talker("x", 9, 1, start), "x", TalkSettings(), lambda: None)
        with pytest.raises(RuntimeError, match="ended before its end"):
            while True:
                await relay.take()

    asyncio.run(unfinished())
