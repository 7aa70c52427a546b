"""A few rows of each data set that a chat model is asked, as the Hub's parquet export has them."""

import io

import pyarrow as pa
import pyarrow.parquet as pq


def arc_rows(count, first):
    """Questions of three to five choices, named by letters or, every third, by numbers."""
    rows = []
    for i in range(count):
        size = 3 + i % 3
        label = list("12345" if i % 3 == 2 else "ABCDE")[:size]
        choices = {"text": [f"choice {first + 10 * i + k}" for k in range(size)], "label": label}
        row = {"id": f"q{i}", "question": f"What is {first + i}?", "choices": choices, "answerKey": label[i % size]}
        rows.append(row)
    return rows


MMLU_ROWS = [
    {"question": f"Which is {i}?", "subject": "astronomy", "choices": [f"{i}.{k}" for k in range(4)], "answer": i % 4}
    for i in range(13)
]
GSM8K_ROWS = [
    {
        "question": f"Ann has {i} plants and gets {i + 1}. How many?",
        "answer": f"She has {i}+{i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1} plants.\n#### {2 * i + 1}",
    }
    for i in range(1000, 1007)
]
HUMANEVAL_ROWS = [
    {
        "task_id": f"HumanEval/{i}",
        "prompt": f'from typing import List\n\n\ndef add_{i}(x: int) -> int:\n    """Adds {i}."""\n',
        "canonical_solution": f"    return x + {i}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n    assert candidate(-5) == {i - 5}\n",
        "entry_point": f"add_{i}",
    }
    for i in range(5)
]
# {repository: {folder of the export: rows}}
EXPORTS = {
    "allenai/ai2_arc": {"ARC-Easy/test": arc_rows(11, 100), "ARC-Challenge/test": arc_rows(7, 500)},
    "cais/mmlu": {"all/test": MMLU_ROWS, "all/dev": MMLU_ROWS[:2]},
    "openai/gsm8k": {"main/test": GSM8K_ROWS},
    "openai/openai_humaneval": {"openai_humaneval/test": HUMANEVAL_ROWS},
}


def parquet(rows):
    """Rows as the bytes of a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def export_files(folders, parts=2):
    """{path: bytes} of an export, each table in `parts` files, as the Hub names them."""
    files = {}
    for folder, rows in folders.items():
        cut = -(-len(rows) // parts)
        for i in range(parts):
            files[f"{folder}/{i:04d}.parquet"] = parquet(rows[i * cut : (i + 1) * cut])
    return files


def add_exports(hub):
    """Puts all of them on a loopback Hub; returns {repository: commit of the export}."""
    commits = {}
    for repo, folders in EXPORTS.items():
        commits[repo] = hub.add_repo(repo, export_files(folders), "dataset")
        hub.repos["dataset", repo].branches["refs/convert/parquet"] = commits[repo]
        hub.add_repo(repo, {"README.md": b"the main branch has other files"}, "dataset")
    return commits
