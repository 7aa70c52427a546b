"""A bundle from a server, a zip and a folder; and one line for every kind of damage."""

import json
import shutil
import zipfile

import pytest
from bundle import tasks, write_bundle
from corpus import is_one_line
from web import Web

from onechip import bundle as room
from onechip import machine
from onechip.bundle import open_bundle, read_bundle
from onechip.errors import UserError

MADE = tasks()


@pytest.fixture
def folder(tmp_path):
    return write_bundle(tmp_path / "eval_bundle", MADE)


@pytest.fixture
def zipped(folder, tmp_path):
    """The bundle as it is published: one folder in a zip."""
    return shutil.make_archive(str(tmp_path / "published"), "zip", tmp_path, folder.name)


def line_of(folder, label, number):
    """(path, lines) of a task's file, and which of them is meant."""
    (path,) = folder.rglob(f"{label}.jsonl")
    return path, path.read_text().split("\n"), number - 1


def change_row(folder, label, number, **fields):
    """Changes fields of a row; one that is ... is deleted."""
    path, lines, i = line_of(folder, label, number)
    row = json.loads(lines[i]) | fields
    lines[i] = json.dumps({name: value for name, value in row.items() if value is not ...})
    path.write_text("\n".join(lines))


def assert_whole(tasks_read):
    """Every field of every task is what the bundle was made of."""
    for task, (label, kind, shots, delimiter, percent, rows) in zip(tasks_read, MADE, strict=True):
        assert task[:5] == (label, kind, rows, shots, delimiter) and task.baseline == pytest.approx(percent / 100)


def test_a_folder_a_zip_and_a_server_give_the_same_tasks(folder, zipped, monkeypatch, tmp_path):
    """The server is asked once; what it sent is unpacked once; a folder above the bundle's own works as well."""
    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path / "home"))
    for source in (folder, folder.parent, zipped):
        assert_whole(open_bundle(str(source)))
    with Web(open(zipped, "rb").read()) as web:
        assert_whole(open_bundle(url=web.url))
        assert_whole(open_bundle(url=web.url))
        assert len(web.requests) == 1
    (unpacked,) = [path for path in (machine.home() / "eval").iterdir() if path.is_dir()]
    assert len(unpacked.name) == 16 and (unpacked / "eval_bundle" / "core.yaml").exists()


def test_another_source_than_the_three_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nothing: there is no such bundle; give a folder or a zip with core.yaml") as e:
        open_bundle(str(tmp_path / "nothing"))
    assert is_one_line(e)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: has no core.yaml; fetch the bundle again"):
        open_bundle(str(tmp_path / "empty"))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(UserError, match="other.zip: has no core.yaml"):
        open_bundle(str(tmp_path / "other.zip"))


def test_a_task_of_another_size_than_is_known_is_told(tmp_path, capsys):
    """It is read all the same."""
    label, *rest = MADE[0]
    read_bundle(write_bundle(tmp_path, [("copa", *rest)]))
    out = capsys.readouterr().out
    assert out.startswith("copa: 14 examples in ") and out.endswith("100 are known: not the same data\n")
    assert len(room.EXAMPLES) == 22 and sum(room.EXAMPLES.values()) == 91_037


CHOICE = "toy_choice.jsonl, line 2: "
DAMAGE = {
    "no gold": ({"gold": ...}, "has gold=None, which is none of its 4 choices"),
    "gold too large": ({"gold": 4}, "has gold=4, which is none of its 4 choices"),
    "gold negative": ({"gold": -1}, "has gold=-1"),
    "gold no number": ({"gold": True}, "has gold=True"),
    "no choices": ({"choices": []}, "has no list of texts 'choices'"),
    "one choice no text": ({"choices": ["a", None]}, "has no list of texts 'choices'"),
    "choices no list": ({"choices": "ab"}, "has no list of texts 'choices'"),
    "no query": ({"query": ...}, "has no text 'query'"),
    "query no text": ({"query": ["a"]}, "has no text 'query'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_row_that_cannot_be_asked_is_named(folder, name):
    fields, what = DAMAGE[name]
    change_row(folder, "toy_choice", 2, **fields)
    with pytest.raises(UserError) as refused:
        read_bundle(folder)
    assert f"{CHOICE}{what}" in str(refused.value) and is_one_line(refused)


@pytest.mark.parametrize(
    "label, fields, what",
    [
        ("toy_schema", {"context_options": ...}, "has no list of texts 'context_options'"),
        ("toy_schema", {"continuation": ...}, "has no text 'continuation'"),
        ("toy_words", {"context": None}, "has no text 'context'"),
        ("toy_words", {"continuation": ""}, "has an empty 'continuation'"),
    ],
)
def test_rows_of_other_kinds_are_checked_too(folder, label, fields, what):
    change_row(folder, label, 3, **fields)
    with pytest.raises(UserError, match=f"{label}.jsonl, line 3: {what}"):
        read_bundle(folder)


def write(path, text):
    path.write_text(text)


def data(folder, label="toy_choice"):
    return folder / "eval_data" / "multiple_choice" / f"{label}.jsonl"


DAMAGED_FILES = {
    "missing": (lambda f: data(f).unlink(), "toy_choice.jsonl: is missing or cannot be read"),
    "cut": (lambda f: write(data(f), data(f).read_text()[:-20]), "toy_choice.jsonl, line 14: is cut: the file ends"),
    "not JSON": (lambda f: write(data(f), "{}}\n"), "toy_choice.jsonl, line 1: is not JSON"),
    "a blank line": (lambda f: write(data(f), "\n" + data(f).read_text()), "toy_choice.jsonl, line 1: is not JSON"),
    "deep": (lambda f: write(data(f), "[" * 100_000 + "\n"), "toy_choice.jsonl, line 1: is not JSON"),
    "a list": (lambda f: write(data(f), "[1]\n"), "toy_choice.jsonl, line 1: is not an object in braces"),
    "not UTF-8": (lambda f: data(f).write_bytes(b"{}\n\xff\n"), "toy_choice.jsonl, line 2: is not UTF-8 text"),
    "empty": (
        lambda f: write(data(f), ""),
        "toy_choice.jsonl: has 0 examples, 0 solved ones",
    ),
    "too few": (
        lambda f: write(data(f, "toy_choice_shots"), data(f, "toy_choice_shots").read_text().split("\n", 3)[0] + "\n"),
        "toy_choice_shots.jsonl: has 1 examples, 3 solved ones and a question take 4",
    ),
    "no baselines": (lambda f: (f / "eval_meta_data.csv").unlink(), "eval_meta_data.csv: is missing"),
    "a baseline missing": (
        lambda f: write(f / "eval_meta_data.csv", "Eval Task,Random baseline\ntoy_choice,25\n"),
        "eval_meta_data.csv: 'Random baseline'=None of 'Eval Task'='toy_choice_shots' is no percentage",
    ),
    "a baseline of 100": (
        lambda f: write(f / "eval_meta_data.csv", "Eval Task,Random baseline\ntoy_choice,100\n"),
        "'Random baseline'='100' of 'Eval Task'='toy_choice' is no percentage from 0 to below 100",
    ),
    "no YAML": (lambda f: write(f / "core.yaml", "icl_tasks: [\n"), "core.yaml: is not YAML"),
    "YAML that runs code": (
        lambda f: write(f / "core.yaml", "icl_tasks: !!python/object/apply:os.system ['true']\n"),
        "core.yaml: is not YAML",
    ),
    "no tasks": (lambda f: write(f / "core.yaml", "tasks: []\n"), "core.yaml: has no list 'icl_tasks'"),
    "large": (lambda f: write(f / "core.yaml", "#" * (2 << 20)), "core.yaml: has more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_a_damaged_file_is_named(folder, name):
    damage, what = DAMAGED_FILES[name]
    damage(folder)
    with pytest.raises(UserError) as refused:
        read_bundle(folder)
    assert what in str(refused.value) and is_one_line(refused) and "fetch the bundle again" in str(refused.value)


@pytest.mark.parametrize(
    "old, new, what",
    [
        ("label: toy_choice\n", "label: 7\n", "task 1: has no label"),
        ("label: toy_schema\n", "label: toy_words\n", "has two tasks of one label"),
        (
            "icl_task_type: schema",
            "icl_task_type: essay",
            "toy_schema: icl_task_type='essay' is none of",
        ),
        ("multiple_choice/toy_choice.jsonl", "/etc/passwd", "dataset_uri='/etc/passwd' is no path inside eval_data"),
        ("multiple_choice/toy_choice.jsonl", "../x", "dataset_uri='../x' is no path inside eval_data"),
        ("num_fewshot: [3]", "num_fewshot: 3", "toy_choice_shots: num_fewshot=3 is no list with a number"),
        ("num_fewshot: [3]", "num_fewshot: [-1]", "toy_choice_shots: num_fewshot=[-1] is no list with a number"),
        ('continuation_delimiter: "\\nAnswer: "', "continuation_delimiter: 5", "continuation_delimiter=5 is no text"),
    ],
)
def test_a_task_that_cannot_be_read_is_named(folder, old, new, what):
    path = folder / "core.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError) as refused:
        read_bundle(folder)
    assert what in str(refused.value) and "core.yaml" in str(refused.value) and is_one_line(refused)
