"""onechip/gpt2.py: GPT-2 in JAX against float64 NumPy, and what it refuses to read."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_gpt2 import SIZES, reference_logits, reference_score, write_gpt2

from onechip import gpt2
from onechip.errors import UserError
from onechip.questions import Text

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is no dependency: uv run --with torch pytest"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(arrays as written, config, params) of the small GPT-2."""
    folder = tmp_path_factory.mktemp("gpt2")
    arrays = write_gpt2(folder)
    config = gpt2.read_config(folder / "config.json")
    return arrays, config, gpt2.read_params(config, folder / "model.safetensors")


def some_texts():
    """Texts of all lengths up to beyond the context, scored in their middle, to their end, or nowhere."""
    draw = np.random.default_rng(1)
    ids = lambda count: draw.integers(0, SIZES["vocab_size"], count).tolist()
    return [
        *(Text(ids(n), max(1, n // 3), n - n // 5) for n in (2, 3, 9, 17, 22, 23)),
        Text(ids(23), 1, 23),
        Text(ids(31), 12, 31),  # cropped to its last 23
        Text(ids(7), 5, 5),
    ]


def test_logits_of_the_definition(model):
    """At every position the logits are those of the float64 reference."""
    arrays, config, params = model
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (3, 19), dtype=np.int32)
    logits = gpt2.final_states(config, params, tokens) @ params["wte.weight"].T
    expected = np.stack([reference_logits(arrays, row) for row in tokens])
    assert expected.std() > 1
    np.testing.assert_allclose(logits, expected, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("budget", [1, 60, 4096])
def test_scores_whatever_the_batch(model, budget):
    """Nats, counts and exactness of each text, also where greedy tokens make a text exact, at any batch size."""
    arrays, config, params = model
    texts = some_texts()
    greedy = list(texts[3].tokens[:4])
    for _ in range(5):
        greedy.append(int(reference_logits(arrays, greedy)[-1].argmax()))
    texts.append(Text(greedy, 4, 9))
    scores = gpt2.make_text_scorer(config, params, budget)(texts)
    for score, text in zip(scores, texts, strict=True):
        nats, count, exact = reference_score(arrays, text)
        assert (score.count, score.exact) == (count, exact) and score.nats == pytest.approx(nats, rel=1e-5, abs=1e-6)
    assert scores[-1].exact and not scores[0].exact and scores[-2] == (0.0, 0, True)


def test_many_scored_tokens_are_read_out_in_parts(model, monkeypatch):
    """More scored tokens than logits are kept at once: the same scores."""
    _, config, params = model
    texts = some_texts()
    whole = gpt2.make_text_scorer(config, params)(texts)
    monkeypatch.setattr(gpt2, "READ_AT_ONCE", 7)
    parts = gpt2.make_text_scorer(config, params)(texts)
    np.testing.assert_allclose([s.nats for s in parts], [s.nats for s in whole], rtol=1e-6)


def test_few_programs(model):
    """Texts of many lengths are padded to few: for GPT-2's context, five."""
    assert gpt2.padded_lengths(1024) == [64, 128, 256, 512, 1024] and gpt2.padded_lengths(23) == [23]


def test_a_scored_token_without_any_before_it_is_refused(model):
    """The context must hold all that is scored and one token more."""
    _, config, params = model
    with pytest.raises(UserError, match="text=40 tokens, scored from 17: the model's context of 23"):
        gpt2.make_text_scorer(config, params)([Text([1] * 40, 17, 40)])


def test_names_of_both_kinds(model, tmp_path):
    """Files with the prefix, causal masks and the head's copy give the same parameters; another head is refused."""
    arrays, config, params = model
    named = {f"transformer.{name}": array for name, array in arrays.items()}
    named |= {"transformer.h.0.attn.bias": np.ones((1, 1, 23, 23), np.float32), "lm_head.weight": arrays["wte.weight"]}
    save_file(named, tmp_path / "a.safetensors")
    again = gpt2.read_params(config, tmp_path / "a.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params, again)
    save_file(named | {"lm_head.weight": arrays["wte.weight"] + 1}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="lm_head.weight.*only the embedding as the head"):
        gpt2.read_params(config, tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama': only 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function='relu': only 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"n_head": 4}, "n_embd=21: must be a multiple of n_head"),
        ({"n_layer": 0}, "n_layer=0: must be a positive integer"),
        ({"n_inner": "x"}, "n_inner='x'"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon=0"),
    ],
)
def test_other_models_are_refused(settings, message, tmp_path):
    """What would compute something else is named in one line."""
    write_gpt2(tmp_path, settings=settings)
    with pytest.raises(UserError, match=message):
        gpt2.read_config(tmp_path / "config.json")


def test_weights_that_do_not_fit_are_refused(model, tmp_path):
    """An array that is absent, and one of another shape."""
    arrays, config, _ = model
    save_file({name: a for name, a in arrays.items() if name != "h.3.ln_2.bias"}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="h.3.ln_2.bias=None: is absent"):
        gpt2.read_params(config, tmp_path / "a.safetensors")
    save_file(arrays | {"wpe.weight": arrays["wpe.weight"][:20]}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"wpe.weight=\(20, 21\): config.json says \(23, 21\)"):
        gpt2.read_params(config, tmp_path / "b.safetensors")


def test_the_tokenizer_keeps_special_tokens_in_text(model, tmp_path):
    """<|endoftext|> in a text is text; without that token, or with too many, a tokenizer is refused."""
    _, config, _ = model
    write_gpt2(tmp_path)
    encode, bos = gpt2.read_tokenizer(tmp_path / "tokenizer.json", config)
    assert bos == SIZES["vocab_size"] - 1 and bos not in encode(["a<|endoftext|>b"])[0] and encode(["the of", "a"])[1]
    parsed = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(parsed | {"added_tokens": []}))
    with pytest.raises(UserError, match="GPT-2's tokenizer has it"):
        gpt2.read_tokenizer(tmp_path / "other.json", config)
    with pytest.raises(UserError, match="vocabulary=283: config.json says 282"):
        gpt2.read_tokenizer(tmp_path / "tokenizer.json", config._replace(vocab_size=282))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer.json"):
        gpt2.read_tokenizer(tmp_path / "other.json", config)


@needs_torch
def test_logits_of_transformers(model, tmp_path):
    """At every position the logits are those of transformers' GPT2LMHeadModel, opened from the same folder."""
    import torch
    from transformers import GPT2LMHeadModel

    arrays, config, params = model
    write_gpt2(tmp_path, arrays)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (3, 19), dtype=np.int32)
    ours = np.asarray(gpt2.final_states(config, params, tokens) @ params["wte.weight"].T)
    with torch.inference_mode():
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path)(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    print("largest difference", np.abs(ours - theirs).max(), "of", np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, atol=3e-5 * np.abs(theirs).max())
