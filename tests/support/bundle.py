"""A CORE bundle made by hand: all kinds of tasks, answers of one to several tokens, and a tokenizer to go with it."""

import csv
import json
from pathlib import Path

import numpy as np

# Of thirty ids; BOS is the next one. Pairs begin with a blank or a letter, so no token reaches over an answer's start.
PIECES = [*"abcdeinorstw .:A\n", " a", " b", " c", "an", "er", "st", "\n\n", "or", "in", " t", "ad", "ne"]
BOS = 30


def encode(text):
    """Ids of a text, greedily: two characters at a time where there is such a piece."""
    ids, at = [], 0
    while at < len(text):
        size = 2 if text[at : at + 2] in PIECES[17:] else 1
        ids.append(PIECES.index(text[at : at + size]))
        at += size
    return ids


def encode_all(texts):
    """Ids of each text, without BOS."""
    return [encode(text) for text in texts]


def words(rng, low, high):
    """Some words of one to five letters."""
    sizes = rng.integers(1, 6, rng.integers(low, high + 1))
    return " ".join("".join(rng.choice(list("abcdeinorst"), size)) for size in sizes)


def multiple_choice(rng, count, choices, low=2, high=6):
    """Rows of a task: choices that differ, one of them right."""
    rows = []
    for _ in range(count):
        answers = [f"{words(rng, 1, 3)}{letter}" for letter in "abcdei"[:choices]]
        rows.append({"query": words(rng, low, high) + ":", "choices": answers, "gold": int(rng.integers(choices))})
    return rows


def schema(rng, count):
    """Rows of a task: two contexts, of different lengths, and one continuation."""
    rows = []
    for _ in range(count):
        contexts = [words(rng, 2, 5), words(rng, 3, 6)]
        rows.append({"context_options": contexts, "continuation": words(rng, 1, 3), "gold": int(rng.integers(2))})
    return rows


def language_modeling(rng, count):
    """Rows of a task: contexts with blanks around them, which are stripped, and one short answer."""
    return [{"context": f" {words(rng, 2, 6)}: \n", "continuation": words(rng, 1, 1)} for _ in range(count)]


def likeliest_answers(rows, logits):
    """Rows whose first two thirds go on, right after their context, as a model finds likeliest: two tokens."""
    found = []
    for i, row in enumerate(rows):
        ids = [BOS, *encode(row["context"].strip())]
        for _ in range(2):
            ids.append(int(np.argmax(logits(np.array([ids]))[0, -1])))
        answer = "".join(PIECES[i] for i in ids[-2:] if i < BOS)
        kept = answer and encode(row["context"].strip() + answer) == ids[1:]  # no two pieces make a third
        found.append({**row, "continuation": answer} if kept and i % 3 else row)
    return found


def tasks(logits=None, seed=0):
    """[(label, kind, shots, delimiter, baseline in percent, rows)]: the three kinds, with and without solved examples.

    One task has answers of which one may begin the others, one has equal ones. logits: of a model, which then gets some
    language modelling right.
    """
    rng = np.random.default_rng(seed)
    nested = multiple_choice(rng, 12, 3)
    for row in nested[::2]:
        row["choices"][row["gold"]] = row["choices"][0][:2]
    equal = multiple_choice(rng, 10, 4)
    for row in equal[::2]:
        row["choices"][3] = row["choices"][1]
        row["gold"] = 1 + 2 * (row["gold"] % 2)
    near = language_modeling(rng, 15)
    near = likeliest_answers(near, logits) if logits else near
    return [
        ("toy_choice", "multiple_choice", 0, " ", 25, multiple_choice(rng, 14, 4)),
        ("toy_choice_shots", "multiple_choice", 3, "\nAnswer: ", 20, multiple_choice(rng, 11, 5)),
        ("toy_nested", "multiple_choice", 1, " ", 33.3, nested),
        ("toy_equal", "multiple_choice", 0, "\nAnswer: ", 25, equal),
        ("toy_schema", "schema", 0, " ", 50, schema(rng, 13)),
        ("toy_schema_shots", "schema", 2, " ", 50, schema(rng, 9)),
        ("toy_words_near", "language_modeling", 0, "", 0, near),
        ("toy_words", "language_modeling", 0, " ", 0, language_modeling(rng, 15)),
        ("toy_words_shots", "language_modeling", 2, "\nAnswer: ", 9.1, language_modeling(rng, 10)),
    ]


def write_bundle(folder, entries):
    """Writes core.yaml, eval_meta_data.csv and eval_data/ of `tasks` into a folder; returns it."""
    folder, lines = Path(folder), ["icl_tasks:"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "eval_meta_data.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Eval Task", "Task Category", "Random baseline", "Description"])
        for label, kind, shots, delimiter, baseline, rows in entries:
            uri = f"{kind}/{label}.jsonl"
            lines += ["-", f"  label: {label}", f"  dataset_uri: {uri}", f"  num_fewshot: [{shots}]"]
            lines += [f"  icl_task_type: {kind}"]
            lines += [f"  continuation_delimiter: {json.dumps(delimiter)}"] if delimiter != " " else []
            table.writerow([label, "toys", baseline, "made by hand,\nin two lines"])
            path = folder / "eval_data" / uri
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "core.yaml").write_text("\n".join(lines) + "\n")
    return folder
