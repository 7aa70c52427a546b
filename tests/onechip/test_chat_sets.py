"""onechip/chat_sets.py: the Hub's conversations, and nanochat's spelling rules, as sources of a mixture."""

import chat_data
import numpy as np
import pytest
from hub import connected_hub

from onechip.chat_sets import HUB_SETS, SPELLING_SETS, hub_source, spelling_source
from onechip.conversations import check_messages
from onechip.errors import UserError
from onechip.hubdata import open_rows
from onechip.spelling import read_words, spelling_bee_item
from onechip.verifiable import open_problems


def talks(count, word, broken=None):
    """Rows of SmolTalk, every third with a system message; row `broken` has two users' in a row."""
    rows = []
    for i in range(count):
        messages = [{"role": "user", "content": f"{word} {i}"}, {"role": "assistant", "content": f"answer {i}"}]
        messages = [{"role": "system", "content": "Be brief."}] * (i % 3 == 0) + messages
        rows.append({"messages": messages[:1] * 2 if i == broken else messages, "source": "rule"})
    return rows


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A loopback Hub with the exports, and SmolTalk's of 17 and 5 rows."""
    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path / "home"))
    with connected_hub(monkeypatch) as hub:
        chat_data.add_exports(hub)
        more = {
            "HuggingFaceTB/smol-smoltalk": {"default/train": talks(17, "hello"), "default/test": talks(5, "held out")},
            "cais/mmlu": {"all/auxiliary_train": chat_data.MMLU_ROWS[:7], "all/validation": chat_data.MMLU_ROWS[7:]},
            "openai/gsm8k": {"main/train": chat_data.GSM8K_ROWS[:4], "main/test": chat_data.GSM8K_ROWS[4:]},
        }
        hub.commits = {}
        for repo, folders in more.items():
            hub.commits[repo] = hub.add_repo(repo, chat_data.export_files(folders), "dataset")
            hub.repos["dataset", repo].branches["refs/convert/parquet"] = hub.commits[repo]
        yield hub


SIZES = {"smoltalk": (17, 5), "mmlu": (7, 6), "gsm8k": (4, 3)}


@pytest.mark.parametrize("name", HUB_SETS)
def test_sets_are_downloaded_and_read_in_the_seeds_order(hub, name):
    """Each row is a conversation; after the last one comes the first; the commits of what was read come with it."""
    source, commits = hub_source(name)
    learned, asked, make = HUB_SETS[name]
    assert set(commits.values()) == {hub.commits[learned.repo]} and set(commits) == {learned.split, asked.split}
    for get, table, size in zip((source.messages, source.held_out), (learned, asked), SIZES[name], strict=True):
        rows = open_rows(table)
        assert rows.size == size and sorted(rows.order) == list(range(size))
        np.testing.assert_array_equal(rows.order, np.random.default_rng(42).permutation(size))
        for i in range(size):
            check_messages(get(i))
            assert get(i) == make(rows.row(i)) == get(i + size)
    assert source.messages(0) != source.held_out(0)


def test_a_row_that_is_no_conversation_is_named(hub):
    """When it is asked for, with its place in the shuffled order."""
    files = chat_data.export_files({"default/train": talks(6, "hello", broken=4), "default/test": talks(2, "x")})
    repo = "HuggingFaceTB/smol-smoltalk"
    hub.repos["dataset", repo].branches["refs/convert/parquet"] = hub.add_repo(repo, files, "dataset")
    source, _ = hub_source("smoltalk")
    place = list(np.random.default_rng(42).permutation(6)).index(4)
    with pytest.raises(UserError, match=rf"smoltalk: row {place} of the shuffled ones.*messages\[1\].role='user'"):
        source.messages(place + 6)


def test_spelling_by_nanochats_rules():
    """Its examples of the training split are learned, and those of the test split held out."""
    for name in SPELLING_SETS:
        source = spelling_source(name)
        for i in range(20):
            check_messages(source.messages(i))
            check_messages(source.held_out(i))
        assert source.messages(3) != source.held_out(3)
    assert spelling_source("spelling-bee").messages(5) == spelling_bee_item(5, read_words(), test=False)["messages"]


def test_gsm8k_as_problems(hub):
    """Either split's own questions, graded by the number after ####: only the solution is right;
    the commits of what was read come with them."""
    problem, commits = open_problems(["gsm8k"])
    source, wanted = hub_source("gsm8k")
    assert commits == wanted
    for held_out, get, size in ((False, source.messages, 4), (True, source.held_out, 3)):
        for number in range(size + 1):
            question, solution = get(number)
            asked = problem(number, held_out)
            said = solution["content"][-1]["text"]
            assert asked.prompt == question["content"] and asked.grade(said) == 1
            assert asked.grade(said.rpartition("####")[0]) == 0 and asked.grade("#### 123456789") == 0
    assert problem(0).prompt != problem(0, True).prompt
