"""What a stranger finds in a model's repository: a card whose lines run, and a tokenizer that other tools load."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys

import huggingface_hub
import pytest
from conftest import ROOT
from hub import Hub

from onechip.card import model_card

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")

TOKEN = "hf_secret_word"
SMALL = (
    "--n_head 2 --head_dim 16 --aspect_ratio 16 --seq_len 64 --vocab_size 512 --device_batch_size 2 "
    "--total_batch_size 4 --num_iterations 12 --eval_tokens 2048 --data offline --name shown"
).split()


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory):
    """(hub, folder with what arrived there) of a run of 02 with a token."""
    folder = tmp_path_factory.mktemp("uploaded")
    with Hub(users={TOKEN: "someone"}) as hub:
        environment = os.environ | hub.environment() | {"HF_TOKEN": TOKEN}
        command = [sys.executable, str(ROOT / "02_train.py"), *SMALL, "--out", str(folder / "runs")]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        for name, raw in hub.files("someone/onechip-shown").items():
            if "/" not in name:
                (folder / name).write_bytes(raw)
        yield hub, folder


def test_the_card_says_what_it_is(uploaded):
    """Its header is one that the Hub reads; score, size, data, curve and config are in it, and no token is."""
    _, folder = uploaded
    text = (folder / "README.md").read_text()
    header = huggingface_hub.ModelCard(text).data
    assert (header.license, header.library_name, header.pipeline_tag) == ("mit", "jax", "text-generation")
    assert "onechip" in header.tags
    for said in (
        "bits per byte, where gzip -9 needs",
        "12 of 12 steps of 256 tokens",
        "stdlib at revision",
        "512 tokens",
    ):
        assert said in text
    assert "(loss.png)" in text and (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert '"n_head": 2' in text and TOKEN not in text


def test_a_card_names_its_dataset_and_does_not_need_a_score(uploaded):
    """FineWeb-Edu is a dataset that the Hub knows; a run stopped before its first evaluation has no score."""
    _, folder = uploaded
    result = train.Result({}, 3, None, None, 2.4, [], folder)
    about = json.loads((folder / "config.json").read_text()) | {"commit": None}
    text = model_card(result, about, 5, "pass", tok.FINEWEB_REPO)
    assert huggingface_hub.ModelCard(text).data.datasets == [tok.FINEWEB_REPO]
    assert "| held-out text | not taken yet |" in text and "commit unknown" in text


def test_the_lines_of_the_card_run(uploaded, tmp_path):
    """Copied as they stand, on a machine that has only a clone: they fetch the model and write what the card shows."""
    hub, folder = uploaded
    text = (folder / "README.md").read_text()
    [lines] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert lines.count("\n") == 5 and "'someone/onechip-shown'" in lines
    home = {"HF_HOME": str(tmp_path), "ONECHIP_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
    environment = os.environ | hub.environment() | home
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = dict(re.findall(r"^('.*?') -> (['\"].*)$", text, re.MULTILINE))
    assert done.stdout == "import " + ast.literal_eval(shown["'import '"]) + "\n"
    assert TOKEN not in done.stdout + done.stderr


def test_transformers_loads_the_tokenizer(uploaded):
    """The same ids, a special token that is spelled out in a text stays text, and <|bos|> is known by its role."""
    transformers = pytest.importorskip("transformers")
    _, folder = uploaded
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tok.load_tokenizer(folder / "tokenizer.json")
    for text in ("def f(x):\n\n    return  x  # héé 12345", "a <|bos|> in a text . ' s"):
        ids = theirs(text)["input_ids"]
        assert [ours.token_to_id("<|bos|>"), *ids] == tok.encode_batch(ours, [text])[0]
        assert theirs.decode(ids) == text
    assert (theirs.bos_token, len(theirs)) == ("<|bos|>", 512)
