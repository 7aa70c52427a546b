"""onechip/foreign.py: other people's models from a folder and from the Hub, and their bits per byte."""

import importlib.util
import json
import math

import numpy as np
import pytest
from hub import connected_hub
from tiny_gpt2 import SIZES, reference_logits, reference_score, write_gpt2, write_tokenizer

from onechip import foreign
from onechip.core import ask, choose_items, examples_for, render
from onechip.errors import UserError
from onechip.questions import EvalTask, Text
from onechip.texts import bits_per_byte

has_torch = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not has_torch, reason="torch is no dependency: uv run --with torch pytest")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, arrays, Foreign) of the small GPT-2."""
    folder = tmp_path_factory.mktemp("tiny")
    arrays = write_gpt2(folder)
    return folder, arrays, foreign.open_foreign(folder)


def test_questions_in_their_order(tiny):
    """list[list[Text]] -> list[list[Score]], each that of its text."""
    _, arrays, model = tiny
    draw = np.random.default_rng(3)
    ids = lambda count: draw.integers(0, SIZES["vocab_size"], count).tolist()
    questions = [[Text(ids(9), 4, 9), Text(ids(3), 1, 3)], [], [Text(ids(27), 20, 27)]]
    scores = model.score(questions)
    assert [len(row) for row in scores] == [2, 0, 1]
    for question, row in zip(questions, scores, strict=True):
        for text, score in zip(question, row, strict=True):
            nats, count, exact = reference_score(arrays, text)
            assert score.nats == pytest.approx(nats, rel=1e-5) and (score.count, score.exact) == (count, exact)


def test_bits_per_byte_of_whole_documents(tiny):
    """Nats of every token after <|endoftext|>, the long document in windows, over all bytes."""
    _, arrays, model = tiny
    documents = ["the plant", "数据 and the water of the light, 1024 times the number of naïve energy", "x"]
    bits = bits_per_byte(documents, model.encode, model.bos, model.score, model.context)
    nats = 0.0
    for text in documents:
        ids, done = [model.bos, *model.encode([text])[0]], 1
        while done < len(ids):
            end = min(len(ids), 23 if done == 1 else done + 11)
            begin = max(0, end - 23)
            logits = reference_logits(arrays, ids[begin:end])
            for t in range(done - begin, end - begin):
                nats += np.log(np.exp(logits[t - 1]).sum()) - logits[t - 1, ids[begin + t]]
            done = end
    assert len(model.encode(documents)[1]) > 40
    size = sum(len(text.encode()) for text in documents)
    assert bits.per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5) and bits.size == size


def test_from_the_hub_and_then_from_its_cache(tiny, tmp_path, monkeypatch):
    """A repository is fetched at its commit, without files that are not wanted, and later opened without the Hub."""
    folder = tiny[0]
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {
        "pytorch_model.bin": b"pickle",
        "run.py": b"",
    }
    library = foreign.load_hub()
    real = library.snapshot_download
    with connected_hub(monkeypatch) as hub:
        fetch = lambda repo, **options: real(repo, cache_dir=tmp_path, endpoint=hub.url, **options)
        monkeypatch.setattr(library, "snapshot_download", fetch)
        commit = hub.add_repo("someone/tiny", files)
        model = foreign.open_foreign("someone/tiny")
        asked = len(hub.requests)
        hub.add_repo("someone/tiny", {"config.json": b"{}"})  # another model under the same name
        again = foreign.open_foreign("someone/tiny")
        assert len(hub.requests) == asked
    assert model.revision == again.revision == commit and model.name == "someone/tiny"
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("run.py"))
    texts = [[Text([1, 2, 3], 1, 3)]]
    assert again.score(texts) == tiny[2].score(texts)


def test_what_is_no_model_is_refused_in_one_line(tmp_path):
    """Neither folder nor repository; a folder without settings; a model that needs torch where it is absent."""
    with pytest.raises(UserError, match="model='no folder': no such folder, nor a repository"):
        foreign.open_foreign("no folder")
    with pytest.raises(UserError, match="config.json: cannot be read"):
        foreign.open_foreign(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="transformers cannot open it" if has_torch else "needs torch and transformers"):
        foreign.open_foreign(tmp_path)


def test_a_download_that_was_stopped_is_not_a_model(tmp_path):
    """All parts that an index names must be there."""
    (tmp_path / "config.json").write_text("{}")
    assert not foreign.is_whole(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert foreign.is_whole(tmp_path)
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1-of-2.safetensors").write_bytes(b"")
    assert not foreign.is_whole(tmp_path)


@needs_torch
def test_the_same_gpt2_through_transformers(tiny):
    """Scores, tokens and bits per byte by torch are those by JAX; `logits_to_keep` and padding change nothing."""
    folder, arrays, ours = tiny
    encode, bos, context, score_texts = foreign.open_with_torch(folder)
    assert (bos, context) == (ours.bos, ours.context)
    hard = ["the plant<|endoftext|> water", "naïve 数据\n\n 1024"]
    assert encode(hard) == ours.encode(hard)
    draw = np.random.default_rng(4)
    ids = lambda count: draw.integers(0, SIZES["vocab_size"], count).tolist()
    texts = [Text(ids(9), 4, 9), Text(ids(3), 1, 3), Text(ids(30), 9, 30), Text(ids(5), 2, 2), Text(ids(23), 22, 23)]
    for score, text in zip(score_texts(texts), texts, strict=True):
        nats, count, exact = reference_score(arrays, text)
        assert score.nats == pytest.approx(nats, rel=1e-5, abs=1e-6) and (score.count, score.exact) == (count, exact)


@needs_torch
def test_another_family_through_transformers(tmp_path):
    """A small Llama, which JAX here does not compute: each text's score is that of its logits one at a time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": SIZES["vocab_size"], "max_position_embeddings": 70}
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.5)).eval()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path / "tokenizer.json")
    opening = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(opening))
    opened = foreign.open_foreign(tmp_path)
    assert (opened.bos, opened.context) == (SIZES["vocab_size"] - 1, 70)
    draw = np.random.default_rng(5)
    questions = [[Text(draw.integers(0, 283, n).tolist(), max(1, n // 2), n) for n in (65, 7)], [Text([5, 6], 1, 2)]]
    for question, row in zip(questions, opened.score(questions), strict=True):
        for text, score in zip(question, row, strict=True):
            with torch.inference_mode():
                logits = model(torch.tensor([text.tokens])).logits[0].double().log_softmax(-1).numpy()
            nats = -sum(logits[t - 1, text.tokens[t]] for t in range(text.start, text.end))
            assert score.nats == pytest.approx(nats, rel=1e-5)


@needs_torch
def test_pickled_weights_are_not_read(tiny, tmp_path):
    """A folder that has pytorch_model.bin alone is refused."""
    import torch

    _, arrays, _ = tiny
    write_gpt2(tmp_path)
    torch.save({name: torch.tensor(a) for name, a in arrays.items()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="transformers cannot open it"):
        foreign.open_with_torch(tmp_path)


def test_core_asks_a_foreign_model(tiny):
    """Each verdict of a multiple-choice task through CORE is that of the float64 model; prompts longer than the context
    lose their beginning."""
    _, arrays, model = tiny
    words = "the plant water number of energy light import return self measure".split()
    draw = np.random.default_rng(6)
    some = lambda low, high: " ".join(draw.choice(words, draw.integers(low, high)))
    items = [{"query": some(1, 9), "choices": [some(1, 4) for _ in range(3)], "gold": i % 3} for i in range(12)]
    task = EvalTask("t", "multiple_choice", items, shots=1, baseline=1 / 3)
    outcome = ask(task, model.encode, model.bos, model.score, max_tokens=model.context)
    right, longest, ordered = [], 0, choose_items(task)
    for i, item in enumerate(ordered):
        prompts = render(task, item, examples_for(ordered, i, 1))
        ids = [[model.bos, *tokens] for tokens in model.encode(prompts)]
        start = next(t for t in range(99) if len({tuple(row[: t + 1]) for row in ids}) > 1)
        longest = max(longest, *map(len, ids))
        losses = [reference_score(arrays, Text(row, start, len(row)))[0] / (len(row) - start) for row in ids]
        right.append(int(np.argmin(losses)) == item["gold"])
    assert outcome.correct.tolist() == right and 0 < sum(right) < 12 and longest > SIZES["n_positions"]
