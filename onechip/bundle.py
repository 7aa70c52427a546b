"""The CORE bundle: 22 tasks and their examples as nanochat publishes and reads them, checked before anything runs."""

import csv
import io
import json
import math
import tempfile
from pathlib import Path, PurePosixPath

from onechip.errors import UserError, first_line, say
from onechip.fetch import check_zip, fetch_file, unpack
from onechip.files import clear_abandoned, hash_file
from onechip.machine import home
from onechip.questions import TASK_KINDS, EvalTask

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
BUNDLE_SHA256 = None  # not known yet: the first download's is kept on each machine
TASKS_FILE, BASELINES_FILE, DATA_FOLDER = "core.yaml", "eval_meta_data.csv", "eval_data"
REMEDY = "fetch the bundle again"
# Examples of each task: DCLM's (mlfoundations/dclm, eval/mmlu_and_lowvar.yaml) and those of the data sets.
EXAMPLES = {
    "hellaswag_zeroshot": 10042, "jeopardy": 2117, "bigbench_qa_wikidata": 20321, "arc_easy": 2376,
    "arc_challenge": 1172, "copa": 100, "commonsense_qa": 1221, "piqa": 1838, "openbook_qa": 500,
    "lambada_openai": 5153, "hellaswag": 10042, "winograd": 273, "winogrande": 1267, "bigbench_dyck_languages": 1000,
    "agi_eval_lsat_ar": 230, "bigbench_cs_algorithms": 1320, "bigbench_operators": 210,
    "bigbench_repeat_copy_logic": 32, "squad": 10570, "coqa": 7983, "boolq": 3270,
    "bigbench_language_identification": 10000,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Where it comes from


def fetch_bundle(url=BUNDLE_URL):
    """The bundle's zip, downloaded once a machine."""
    return fetch_file(url, home() / "eval" / PurePosixPath(url).name, BUNDLE_SHA256, check_zip)


def open_bundle(source="", url=BUNDLE_URL):
    """The EvalTasks of a bundle: a folder, a zip, or, of no source, the one that `url` has, fetched once a machine."""
    path = Path(source) if source else fetch_bundle(url)
    if path.is_dir():
        return read_bundle(path)
    if not path.exists():
        raise UserError(
            f"{path}: there is no such bundle; give a folder or a zip with {TASKS_FILE}, or none to fetch it"
        )
    if source:
        with tempfile.TemporaryDirectory(prefix="onechip-bundle-") as scratch:
            unpack(path, Path(scratch) / "bundle")
            return read_bundle(Path(scratch) / "bundle", path)
    clear_abandoned(path.parent)
    folder = path.with_name(hash_file(path)[:16])  # of another file, another folder
    if not folder.exists():
        unpack(path, folder)
    return read_bundle(folder)


def find_root(folder, name):
    """The folder that has core.yaml: this one, or one inside it."""
    roots = [f for f in (folder, folder / "eval_bundle", *sorted(folder.iterdir())) if (f / TASKS_FILE).is_file()]
    if not roots:
        raise UserError(f"{name}: has no {TASKS_FILE}; {REMEDY}")
    return roots[0]


def read_bundle(folder, name=None):
    """The EvalTasks of an unpacked bundle, every example checked; UserError names file, line and what is wrong.

    name: what messages call the folder. A task with another number of examples than is known is reported in a line.
    """
    root = find_root(Path(folder), name or folder)
    shown = Path(name) if name else root
    entries = read_entries(root / TASKS_FILE, shown / TASKS_FILE)
    labels = [entry["label"] for entry in entries]
    baselines = read_baselines(root / BASELINES_FILE, shown / BASELINES_FILE, labels)
    return [read_task(root, shown, entry, baselines[entry["label"]]) for entry in entries]


# ----------------------------------------------------------------------------------------------------------------------
# core.yaml and eval_meta_data.csv


def read_text(path, shown, limit=1 << 30):
    """A text file of the bundle; UserError if it is missing, too large or not UTF-8."""
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise UserError(f"{shown}: has more than {limit:,} bytes; {REMEDY}")
        return raw.decode()
    except OSError as error:
        raise UserError(f"{shown}: is missing or cannot be read ({error.strerror}); {REMEDY}") from None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{shown}, line {line}: is not UTF-8 text; {REMEDY}") from None


def read_entries(path, shown):
    """The tasks in core.yaml, as dicts whose fields have been checked."""
    import yaml  # huggingface_hub's

    text = read_text(path, shown, 1 << 20)
    try:
        table = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{shown}: is not YAML ({' '.join(str(error).split())[:200]}); {REMEDY}") from None
    entries = table.get("icl_tasks") if isinstance(table, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{shown}: has no list 'icl_tasks'; {REMEDY}")
    for number, entry in enumerate(entries, 1):
        if problem := find_problem_of_task(entry):
            raise UserError(f"{shown}, task {number}: {problem}; {REMEDY}")
    labels = [entry["label"] for entry in entries]
    if len(set(labels)) < len(labels):
        raise UserError(f"{shown}: has two tasks of one label; {REMEDY}")
    return entries


def find_problem_of_task(entry):
    """What is wrong with an entry of core.yaml, in a few words; None if nothing is."""
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
        return "has no label"
    label, kind, uri, shots = (entry.get(name) for name in ("label", "icl_task_type", "dataset_uri", "num_fewshot"))
    if kind not in TASK_KINDS:
        return f"{label}: icl_task_type={kind!r} is none of {', '.join(TASK_KINDS)}"
    if not isinstance(uri, str) or not uri or uri.startswith("/") or ".." in PurePosixPath(uri).parts:
        return f"{label}: dataset_uri={uri!r} is no path inside {DATA_FOLDER}"
    if not isinstance(shots, list) or not shots or type(shots[0]) is not int or not 0 <= shots[0] <= 100:
        return f"{label}: num_fewshot={shots!r} is no list with a number from 0 to 100"
    delimiter = entry.get("continuation_delimiter", " ")
    return None if isinstance(delimiter, str) else f"{label}: continuation_delimiter={delimiter!r} is no text"


def read_baselines(path, shown, labels):
    """{label: accuracy of guessing, 0 to 1}, of percentages."""
    rows = csv.DictReader(io.StringIO(read_text(path, shown), newline=""))
    values, baselines = {row.get("Eval Task"): row.get("Random baseline") for row in rows}, {}
    for label in labels:
        try:
            baselines[label] = float(values.get(label)) / 100
        except (TypeError, ValueError):
            baselines[label] = math.nan
        if not 0 <= baselines[label] < 1:
            what = f"'Random baseline'={values.get(label)!r} of 'Eval Task'={label!r}"
            raise UserError(f"{shown}: {what} is no percentage from 0 to below 100; {REMEDY}")
    return baselines


# ----------------------------------------------------------------------------------------------------------------------
# Examples


def is_text(value):
    """Whether a value can stand in a prompt: a string, or a number, which is written as Python does."""
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def find_problem(kind, item):
    """What is wrong with an example, in a few words; None if nothing is."""
    if not isinstance(item, dict):
        return "is not an object in braces"
    answers = {"multiple_choice": "choices", "schema": "context_options"}.get(kind)
    texts = {"multiple_choice": ("query",), "schema": ("continuation",)}.get(kind, ("context", "continuation"))
    for name in texts:
        if not is_text(item.get(name)):
            return f"has no text {name!r}"
    if answers is None:
        return "has an empty 'continuation'" if str(item["continuation"]) == "" else None
    choices, gold = item.get(answers), item.get("gold")
    if not isinstance(choices, list) or not choices or not all(map(is_text, choices)):
        return f"has no list of texts {answers!r}"
    if type(gold) is not int or not 0 <= gold < len(choices):
        return f"has gold={gold!r}, which is none of its {len(choices)} {answers}"
    return None


def read_items(path, shown, kind):
    """The examples of a task's file, one JSON object a line."""
    text, items = read_text(path, shown), []
    lines = text.split("\n")  # not splitlines, which would also split at other characters inside a text
    ended = lines[-1] == ""
    lines = lines[:-1] if ended else lines
    for number, line in enumerate(lines, 1):
        try:
            items.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            torn = number == len(lines) and not ended
            problem = "is cut: the file ends inside it" if torn else f"is not JSON ({first_line(error)})"
            raise UserError(f"{shown}, line {number}: {problem}; {REMEDY}") from None
        if problem := find_problem(kind, items[-1]):
            raise UserError(f"{shown}, line {number}: {problem}; {REMEDY}")
    return items


def read_task(root, shown, entry, baseline):
    """The EvalTask of an entry of core.yaml."""
    label, kind, shots = entry["label"], entry["icl_task_type"], entry["num_fewshot"][0]
    place = Path(DATA_FOLDER) / entry["dataset_uri"]
    items = read_items(root / place, shown / place, kind)
    if len(items) <= shots:
        needed = f"{shots} solved ones and a question take {shots + 1}"
        raise UserError(f"{shown / place}: has {len(items)} examples, {needed}; {REMEDY}")
    if len(items) != EXAMPLES.get(label, len(items)):
        say(f"{label}: {len(items):,} examples in {shown / place}, {EXAMPLES[label]:,} are known: not the same data")
    return EvalTask(label, kind, items, shots, entry.get("continuation_delimiter", " "), baseline)
