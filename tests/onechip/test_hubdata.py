"""onechip/hubdata.py: tables of the Hub's parquet export, downloaded once, in a seeded order."""

import chat_data
import numpy as np
import pytest
from hub import Fault, connected_hub

from onechip.errors import UserError
from onechip.hubdata import Table, load_rows, open_parquet

MMLU = Table("cais/mmlu", "all", "test", ("question", "answer"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A loopback Hub with the exports; its client keeps files in an empty home."""
    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path / "home"))
    with connected_hub(monkeypatch) as hub:
        hub.commits = chat_data.add_exports(hub)
        yield hub


def test_rows_in_the_order_of_the_seed(hub):
    """Both files of the split, permuted by NumPy's generator; only the columns that are asked for; no other split."""
    rows, total, revision = load_rows(MMLU)
    order = np.random.default_rng(42).permutation(13)
    expected = [chat_data.MMLU_ROWS[i] for i in order]
    assert rows == [{"question": row["question"], "answer": row["answer"]} for row in expected]
    assert (total, revision) == (13, hub.commits["cais/mmlu"])
    assert load_rows(MMLU, limit=3)[0] == rows[:3] and load_rows(MMLU, seed=1)[0] != rows
    assert hub.count("GET", "all/dev") == 0


def test_a_table_is_downloaded_once_and_stays_what_it_was(hub, capsys):
    """No request for what is here; a newer export changes nothing on this machine."""
    first = load_rows(MMLU)
    asked = len(hub.requests)
    newer = hub.add_repo("cais/mmlu", chat_data.export_files({"all/test": chat_data.MMLU_ROWS[:4]}), "dataset")
    hub.repos["dataset", "cais/mmlu"].branches["refs/convert/parquet"] = newer
    assert load_rows(MMLU) == first and len(hub.requests) == asked
    assert "stays the one for this machine" in capsys.readouterr().out


def test_a_pinned_revision_is_the_one_that_is_read(hub):
    """A Table that names a commit gets that one, whatever is newest; a branch's name is refused."""
    old = hub.commits["cais/mmlu"]
    newer = hub.add_repo("cais/mmlu", chat_data.export_files({"all/test": chat_data.MMLU_ROWS[:4]}), "dataset")
    hub.repos["dataset", "cais/mmlu"].branches["refs/convert/parquet"] = newer
    assert load_rows(MMLU._replace(revision=old))[1:] == (13, old)
    assert load_rows(MMLU._replace(revision=newer))[1:] == (4, newer)
    with pytest.raises(UserError, match="revision='main': must be a commit of cais/mmlu"):
        load_rows(MMLU._replace(revision="main"))


def test_damage_on_the_way_is_repaired(hub):
    """A flipped bit, a cut and a refusal: the file that arrives is the one that the Hub lists."""
    hub.faults += [Fault("GET", "cdn.*0000.parquet", flip=True), Fault("GET", "cdn.*0001.parquet", cut=True)]
    hub.faults += [Fault("GET", "tree", status=503)]
    assert len(load_rows(MMLU)[0]) == 13 and all(fault.times == 0 for fault in hub.faults)


def test_what_is_not_there_is_named(hub, tmp_path):
    """A split, a repository and a column that do not exist; a file that is no parquet."""
    with pytest.raises(UserError, match="cais/mmlu all/nope.*no parquet files of it"):
        load_rows(MMLU._replace(split="nope"))
    with pytest.raises(UserError, match="nobody/none.*check the name"):
        load_rows(MMLU._replace(repo="nobody/none"))
    with pytest.raises(UserError, match=r"0000.parquet.*column=\['colour'\]: has only question, subject, choices"):
        load_rows(MMLU._replace(columns=("question", "colour")))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(UserError, match="x.parquet: not a complete parquet file"):
        open_parquet(tmp_path / "x.parquet", ("question",))


def test_a_file_that_was_deleted_comes_again(hub, tmp_path):
    """What is missing of a table is downloaded, and nothing else."""
    load_rows(MMLU)
    (path,) = (tmp_path / "home").rglob("0001.parquet")
    path.unlink()
    asked = hub.count("GET", "cdn.*0000.parquet")
    assert len(load_rows(MMLU)[0]) == 13 and hub.count("GET", "cdn.*0000.parquet") == asked
