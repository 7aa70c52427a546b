"""Models that leave: formats, refusals and cards here; what PyTorch's readers compute is skipped where it is missing.

All of it: uv run --with torch --with flatbuffers pytest -n 0 tests/onechip/test_exports.py
"""

import importlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file

from onechip import exports
from onechip.errors import UserError
from onechip.torch_export import beyond_nanochat

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")
maxtext = importlib.import_module("04_maxtext")
speedrun = importlib.import_module("05_speedrun")

COMMON = {
    "attn_impl": "einsum", "dtype": "float32", "device_batch_size": 1, "total_batch_size": 1, "num_iterations": 10,
    "loss_slice": 8, "vocab_size": 300, "rope_base": 50.0,
}  # fmt: skip
SIZES = {"depth": 5, "n_embd": 48, "head_dim": 16, "n_kv_head": 1}  # three heads, five layers
FULL = speedrun.Config(**SIZES, seq_len=520, **COMMON)  # windows of 257 keys
PLAIN = speedrun.Config(**SIZES, seq_len=70, compatible=True, **COMMON)
GATED = maxtext.Config(
    n_embd=96, n_layer=5, n_head=3, n_kv_head=1, head_dim=32, mlp_dim=160, tile=4, seq_len=70, **COMMON
)
GPT = train.Config(
    n_head=6, n_kv_head=2, head_dim=14, aspect_ratio=28, seq_len=72, window_pattern="SLS", softcap=7.0, **COMMON
)
MODELS = {"02": (GPT, train.GPT), "05": (FULL, speedrun.NANOCHAT), "compatible": (PLAIN, speedrun.NANOCHAT),
          "04": (GATED, maxtext.SWIGLU)}  # fmt: skip


def draw(config, table, seed=3):
    """Random float32 parameters, nothing at its start, each branch about as large as the stream."""
    rng = np.random.default_rng(seed)

    def one(path, weight):
        array = rng.normal(size=weight.shape(config)).astype(np.float32)
        if weight.kind == "scalar":
            return np.float32(1 + 0.2 * array) if path[-1].key == "resid_lambdas" else np.float32(0.6 * array)
        return np.float32(array if weight.kind == "embed" else array * config.n_embd**-0.5 * (1 + (array.ndim > 2)))

    return jax.tree_util.tree_map_with_path(one, table)


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of 300 tokens."""
    return tok.train_tokenizer(
        ["the cat sat on the mat, 123 times. " * 40, (ROOT / "onechip/doors.py").read_text()], 300
    )


def source_of(name, tokenizer):
    """exports.Leaving of a model with random weights."""
    config, model = MODELS[name]
    opened = train.Opened(config, draw(config, model.weights(config)), tokenizer, model)
    return exports.Leaving(opened, train.forward, tok.opening_id(tokenizer), False)


def leave(form, name, tokenizer, folder):
    source = source_of(name, tokenizer)
    put = lambda place: tok.export_tokenizer(tokenizer, place)
    return source, exports.write_export(form, source, folder / "exports" / form, put)


def ours(source, tokens):
    opened = source.opened
    return np.asarray(train.forward(opened.config, opened.params, tokens.astype(np.int32), opened.model))


def random_ids(source, rows, length):
    return np.random.default_rng(1).integers(9, source.opened.config.vocab_size, (rows, length))


# ----------------------------------------------------------------------------------------------------------------------
# Without PyTorch


@pytest.mark.parametrize(
    "name, words",
    [("gguf-f16", "65,504"), ("gguf-bf61", "did you mean gguf-bf16"), ("onnx", "use one of torch")],
)
def test_a_format_that_is_not_written_is_refused_in_one_line(name, words):
    """F16 with the reason, a misspelt name with the nearest one, another with the list."""
    with pytest.raises(UserError, match=words) as error:
        exports.check_format(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "form, name, words",
    [
        ("nanochat", "05", "value embeddings; the smear; backout; weights of the embedding .* windows .*qk_scale"),
        ("nanochat", "02", "weights of the embedding in later layers .x0_lambdas.; windows .SLS."),
        ("torch", "04", "c_gate"),
        ("qwen3", "02", "no architecture of another library"),
        ("gguf-bf16", "05", "no architecture of another library"),
    ],
)
def test_a_format_that_cannot_hold_a_model_names_the_parts_it_lacks(form, name, words, tokenizer, tmp_path):
    """In one line, and nothing is left on disk."""
    with pytest.raises(UserError, match=words) as error:
        leave(form, name, tokenizer, tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("exports/*"))


def test_a_compatible_model_has_nothing_that_nanochat_lacks():
    """--compatible leaves out every part."""
    assert beyond_nanochat(PLAIN, draw(PLAIN, speedrun.nanochat_weights(PLAIN))) == []


PROGRAM_ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "onechip" or name[:3] in ("01_", "02_", "05_"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import jax.export, numpy as np
from safetensors.numpy import load_file
folder = sys.argv[1]
program = jax.export.deserialize(bytearray(open(folder + "/logits.stablehlo", "rb").read()))
tokens = np.load(folder + "/tokens.npy")
np.save(folder + "/logits.npy", program.call(load_file(folder + "/params.safetensors"), tokens))
"""


@pytest.mark.parametrize("name", ["02", "compatible"])
@pytest.mark.slow
def test_stablehlo_runs_by_plain_jax(name, tokenizer, tmp_path):
    """A process that can import nothing of ours gets our logits, for any number of rows."""
    pytest.importorskip("flatbuffers", reason="jax.export writes by it, and it is no dependency")
    source, folder = leave("stablehlo", name, tokenizer, tmp_path)
    tokens = random_ids(source, 3, source.opened.config.seq_len).astype(np.int32)
    np.save(folder / "tokens.npy", tokens)
    subprocess.run([sys.executable, "-c", PROGRAM_ALONE, str(folder)], check=True, cwd=tmp_path)
    np.testing.assert_allclose(np.load(folder / "logits.npy"), ours(source, tokens), atol=1e-4)
    assert json.loads((folder / "program.json").read_text())["platforms"] == ["cpu", "cuda"]


def test_int8_is_loaded_by_the_lines_of_its_card(tokenizer, tmp_path):
    """They give every array of the model; a matrix to half a step of its channel's 8 bits, all else exactly."""
    source, folder = leave("int8", "05", tokenizer, tmp_path)
    lines = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(lines, found := {})
    wanted = {}
    for path, array in jax.tree_util.tree_leaves_with_path(source.opened.params):
        wanted[jax.tree_util.keystr(path, simple=True, separator=".")] = array
    assert set(found["params"]) == set(wanted)
    stored = load_file(folder / "int8.safetensors")
    for name, array in wanted.items():
        bound = stored[f"{name}.scale"] * 0.5001 if f"{name}.scale" in stored else 0
        assert np.all(np.abs(found["params"][name] - array) <= bound), name
    assert any(name.endswith(".int8") for name in stored)


# ----------------------------------------------------------------------------------------------------------------------
# By transformers and PyTorch


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is no dependency: see the first lines of this file")


FORMS = [("torch", "02"), ("torch", "05"), ("torch", "compatible"), ("nanochat", "compatible"), ("qwen3", "04")]


@pytest.mark.parametrize("form, name", FORMS)
def test_transformers_computes_our_logits_and_text(form, name, tokenizer, tmp_path, torch):
    """Logits to float32's rounding over most of the context, padding on the left included; 64 greedy tokens with a
    cache, without one, and by ours are equal."""
    from transformers import AutoModelForCausalLM

    source, folder = leave(form, name, tokenizer, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=form == "torch")
    tokens = random_ids(source, 2, source.opened.config.seq_len - 1)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
        padded = torch.tensor(np.pad(tokens[:, :9], ((0, 0), (4, 0))))
        mask = torch.tensor(np.pad(np.ones((2, 9), int), ((0, 0), (4, 0))))
        left = model(padded, attention_mask=mask).logits.numpy()[:, 4:] if form == "torch" else None
    wanted = ours(source, tokens)
    np.testing.assert_allclose(theirs, wanted, atol=2e-4)
    if left is not None:
        np.testing.assert_allclose(left, wanted[:, :9], atol=2e-4)
    write = lambda cache: model.generate(
        torch.tensor(tokens[:1, :5]), max_new_tokens=64, do_sample=False, use_cache=cache, eos_token_id=None
    )[0, 5:].tolist()  # fmt: skip
    opened = source.opened
    text = train.generate(opened.config, opened.params, tokens[0, :5].tolist(), 64, model=opened.model)
    assert write(True) == write(False) == text


@pytest.mark.parametrize("form, name", [("nanochat", "compatible"), ("qwen3", "04")])
def test_what_transformers_saves_is_opened(form, name, tokenizer, tmp_path, torch):
    """A folder that transformers wrote itself, from its own random weights, opens with its logits."""
    from transformers import AutoModelForCausalLM

    _, folder = leave(form, name, tokenizer, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" not in key:
                weight.normal_(std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    tok.export_tokenizer(tokenizer, tmp_path / "theirs")
    opened = train.open_model(tmp_path / "theirs")
    tokens = np.random.default_rng(1).integers(0, 300, (2, 60)).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens.astype(int))).logits.numpy()
    logits = np.asarray(train.forward(opened.config, opened.params, tokens, opened.model))
    np.testing.assert_allclose(logits, theirs, atol=5e-4 * np.abs(theirs).max())


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer


def hostile_text():
    """Characters of all of Unicode's planes, long runs, and text that looks like special tokens."""
    planes = "".join(chr(i) for i in range(1, 0x110000, 337) if not 0xD800 <= i < 0xE000)
    runs = "a" * 3000 + " " * 3000 + "\n" * 99 + "1" * 501 + "!?" * 700 + "\t\r\n" * 50
    return f"{planes} {runs} <|bos|><|user_start|> <|bos|x> it's I'LL 12345\u00a0e\u0301\U0001f469\u200d\U0001f680"


def test_all_readers_of_the_tokenizer_give_the_same_ids(tokenizer, tmp_path):
    """tokenizers, transformers and tiktoken, from the exported folder, on a hostile text, and the text comes back."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    _, folder = leave("int8", "02", tokenizer, tmp_path)
    text = hostile_text()
    [[bos, *wanted]] = tok.encode_batch(tokenizer, [text])
    assert bos not in wanted, "special-looking text is text"
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    auto = AutoTokenizer.from_pretrained(folder)
    assert theirs.encode(text).ids == wanted
    assert auto(text, add_special_tokens=False)["input_ids"] == wanted
    assert tok.fast_encoder(tok.load_tokenizer(folder / "tokenizer.json")).encode_ordinary(text) == wanted
    assert theirs.decode(wanted) == text == auto.decode(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", ["02_train", "05_speedrun", "07_chat", "08_rl"])
def test_each_command_exports_any_run(notebook, tokenizer, tmp_path):
    """The same words by each notebook's command leave the same folder; a run that is not there is named in a line."""
    _, folder = leave("nanochat", "compatible", tokenizer, tmp_path)
    words = [sys.executable, str(ROOT / f"{notebook}.py"), "--export", "int8", "--run"]
    done = subprocess.run([*words, str(folder)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (folder / "exports" / "int8").iterdir()} >= {"README.md", "int8.safetensors"}
    done = subprocess.run([*words, "nowhere"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: model='nowhere'") and done.stderr.count("\n") == 1
