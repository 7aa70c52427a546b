"""onechip/mixture.py: how many of what, in which order, and packed into which rows."""

import collections
import itertools
import json

import numpy as np
import pytest

from onechip.conversations import ChatTokens, render_conversation
from onechip.errors import UserError
from onechip.mixture import Mixture, TalkSource, check_place, masked_batch, packed_conversations, parse_mixture

# A token for each character: a conversation of texts of m and n characters has m + n + 5.
TOKENS = ChatTokens(*range(1000, 1009), encode=lambda text: list(map(ord, text)))
COUNTS = {"a": 5, "b": 11, "c": 3}
LENGTHS = {"a": 4, "b": 9, "c": 17}


def talk(name, number, held_out=False):
    """A conversation that says where it is from; its length varies with its number."""
    said = f"{name}{number}" + "." * ((7 * number + LENGTHS[name]) % 20)
    return [{"role": "user", "content": said}, {"role": "assistant", "content": "HELD"[: 4 * held_out] + "ok"}]


def sources():
    make = lambda name: TalkSource(
        name, lambda n: talk(name, n), lambda n: talk(name, n, True) if name != "c" else None
    )
    return [make("a"), make("b"), TalkSource("c", lambda n: talk("c", n))]


def who(messages):
    return messages[0]["content"].rstrip(".")


def test_an_epoch_has_each_conversation_once_and_the_next_goes_on():
    """19 of epoch e: numbers 5 e to 5 e + 4 of the first source, and so on; each epoch in an order of its own."""
    mixture = Mixture(sources(), COUNTS)
    orders = []
    for epoch in range(3):
        names = [who(mixture.messages(epoch * 19 + i)) for i in range(19)]
        expected = {f"{name}{epoch * count + i}" for name, count in COUNTS.items() for i in range(count)}
        assert set(names) == expected
        orders.append([name[0] for name in names])
    assert orders[0] != orders[1] != orders[2]
    held_out = Mixture(sources(), COUNTS, held_out=True)
    assert held_out.size == 16 and held_out.messages(0)[1]["content"] == "HELDok"


def test_counts_are_parsed_and_refused():
    known = ("a", "b")
    assert parse_mixture("b:20  a:3", known) == {"b": 20, "a": 3}
    refused = {
        "": "must name at least one",
        "x:3": "use a, b, each with a count: a:1000",
        "a": "must have a count",
        "a:0": "count",
        "a:-1": "count",
        "a:1e3": "count",
        "a:1 a:2": "is there twice",
        "a:999999999": "from 1 to 100,000,000",
    }
    for text, said in refused.items():
        with pytest.raises(UserError, match=f"^mixture='.*': .*{said}"):
            parse_mixture(text, known)


def rows_of(length, count, rows=3, position=None):
    """The next batches, (ids, mask, position) each, of `rows` rows."""
    return list(
        itertools.islice(packed_conversations(Mixture(sources(), COUNTS), TOKENS, rows, length, position), count)
    )


def split_row(ids, mask):
    """The conversations in a row, (ids, mask) lists, and how many tokens of padding follow them."""
    starts = np.flatnonzero(ids == TOKENS.bos)
    found = [(ids[a:b].tolist(), mask[a:b].tolist()) for a, b in itertools.pairwise([*starts, len(ids)])]
    whole = [item for item in found if len(item[0]) > 1]
    return whole, len(found) - len(whole)


def test_rows_hold_whole_conversations_each_once_with_their_masks():
    """What is in the rows is what the function makes of each conversation, none twice, none cut; padding is masked."""
    mixture, seen, padding = Mixture(sources(), COUNTS), [], 0
    batches = rows_of(47, 40)
    numbers = {json.dumps(render_conversation(TOKENS, mixture.messages(i))): i for i in range(600)}
    for ids, mask, _ in batches:
        assert ids.shape == mask.shape == (3, 47) and ids.dtype == mask.dtype == np.int32
        for row, learned in zip(ids, mask, strict=True):
            whole, rest = split_row(row, learned)
            seen += [numbers[json.dumps(item)] for item in whole]
            padding += rest
            assert rest == 0 or not learned[-rest:].any()
    assert max(collections.Counter(seen).values()) == 1
    place = batches[-1][2]
    assert place["padding"] == padding and place["tokens"] == 40 * 3 * 47
    assert place["log"]["padding"] == padding / place["tokens"] < 0.1
    assert sorted(seen + place["waiting"]) == list(range(place["next"]))


def test_of_those_that_wait_the_longest_that_fits_is_taken():
    """So nothing that waits fits into what is left of a row."""
    for ids, mask, place in rows_of(40, 12, rows=1):
        rest = split_row(ids[0], mask[0])[1]
        mixture = Mixture(sources(), COUNTS)
        waiting = [len(render_conversation(TOKENS, mixture.messages(n))[0]) for n in place["waiting"]]
        assert min(waiting) > rest


def test_what_is_longer_than_a_row_is_cut_to_it():
    """It fills a row from <|bos|> on, and the others are whole."""
    messages = lambda n: talk("b", n) if n % 2 else [{"role": "user", "content": "x" * 90}, *talk("a", n)[1:]]
    ids, _, _ = next(packed_conversations(Mixture([TalkSource("a", messages)], {"a": 9}), TOKENS, 4, 33))
    cut = [row for row in ids if (row == ord("x")).sum() > 20]
    assert cut and all(row[0] == TOKENS.bos and TOKENS.user_end not in row for row in cut)


def test_a_position_is_json_and_resumes_at_the_very_next_row():
    """From any of them the batches that follow are the same, into the third epoch."""
    batches = rows_of(60, 30)
    for i in (0, 7, 20):
        again = rows_of(60, 29 - i, position=json.loads(json.dumps(batches[i][2])))
        for (ids, mask, place), other in zip(again, batches[i + 1 :], strict=True):
            np.testing.assert_array_equal(ids, other[0])
            np.testing.assert_array_equal(mask, other[1])
            assert place == other[2]
    assert batches[-1][2]["next"] > 2 * 19


NO_PLACES = (
    {}, {"epoch": 0, "shard": 0}, {"next": -1, "waiting": [], "tokens": 0, "padding": 0},
    {"next": 3, "waiting": ["x"], "tokens": 0, "padding": 0},
)  # fmt: skip


@pytest.mark.parametrize("position", NO_PLACES)
def test_a_position_of_something_else_is_refused(position):
    check_place(None)
    check_place(rows_of(60, 1)[0][2])
    with pytest.raises(UserError, match="position=.*is none in a mixture"):
        check_place(position)


def test_the_mask_is_that_of_the_targets():
    """x, y and mask (B, T): y is x one token later, and mask says which of y is learned."""
    ids, mask, _ = rows_of(31, 1)[0]
    batch = masked_batch(ids, mask)
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(("x", "y", "mask"), (3, 30))
    np.testing.assert_array_equal(batch["y"][:, :-1], batch["x"][:, 1:])
    learned = batch["y"][batch["mask"] == 1]
    assert set(learned) == {ord("o"), ord("k"), TOKENS.assistant_end}
