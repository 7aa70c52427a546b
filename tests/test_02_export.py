"""Trained models as others find them: open_model takes whatever a run left, and a card's lines run."""

import ast
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
from conftest import ROOT
from corpus import PROMPTS, TINY, is_one_line, list_checkpoints, newest, read_arrays, tiny, train_tiny
from hub import Hub, connected_hub
from safetensors.numpy import load_file, save_file

from onechip import session
from onechip.checkpoints import flatten
from onechip.disk import rescue_folder
from onechip.errors import UserError
from onechip.export import names_of_files
from onechip.hub import HubPlace, load_hub, upload_folder
from onechip.mirror import Mirror

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")
maxtext = importlib.import_module("04_maxtext")
pytestmark = pytest.mark.usefixtures("compiled_once", "interruptible")

TOKEN = "hf_loopback"


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback that this process's client talks to, with the token that private repositories ask for."""
    library = load_hub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with connected_hub(monkeypatch) as hub:
        download = library.snapshot_download
        monkeypatch.setattr(library, "snapshot_download", lambda *args, **kw: download(*args, endpoint=hub.url, **kw))
        yield hub


def same_params(opened, params):
    """Whether a model's parameters are these, by name and to the last bit."""
    ours, theirs = flatten(opened.params), flatten(params)
    return set(ours) == set(theirs) and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def stop_at_once(row):
    """A listener that asks for an end as soon as it hears of the first step."""
    if row["step"] == 1:
        signal.raise_signal(signal.SIGINT)


def same_tokenizer(opened, tokenizer):
    return tok.tokenizer_hash(opened.tokenizer) == tok.tokenizer_hash(tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# 02's model


@pytest.fixture(scope="module")
def exported(straight, tokenizer):
    """The folder model/ of the straight run."""
    return train.export_model(straight[0], tokenizer)


def test_an_export_opens_and_writes_what_the_run_wrote(straight, tokenizer, exported):
    """Config, parameters, tokenizer and model are the run's; the same seeds give the samples of its end."""
    assert names_of_files(exported) == [
        "README.md", "config.json", "loss.png", "params.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config, params, opened_tokenizer, model = opened = train.open_model(exported)
    assert config == tiny() and model is train.GPT
    assert same_params(opened, straight[0].params) and same_tokenizer(opened, tokenizer)
    assert train.make_sample_writer(config, opened_tokenizer, PROMPTS, model)(params) == straight[0].samples


def test_a_run_opens_at_its_newest_checkpoint(straight, tokenizer, tmp_path):
    """Before anything is exported, too: a run keeps its tokenizer; a relative path and one with ~ are paths."""
    shutil.copytree(straight[0].run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("model", "step_00000026"))
    opened = train.open_model(tmp_path / "run")
    assert opened.config == tiny() and opened.model is train.GPT and same_tokenizer(opened, tokenizer)
    assert same_params(opened, train.open_model(newest(tmp_path / "run")).params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("HOME", str(tmp_path))
        assert same_params(train.open_model("run"), opened.params) and same_params(
            train.open_model("~/run"), opened.params
        )


def test_any_checkpoint_opens_also_apart_from_its_run(straight, tokenizer, tmp_path):
    """Its own parameters, not the newest ones; it holds its settings, its model's name and its tokenizer."""
    checkpoint = straight[0].run_dir / "checkpoints" / "step_00000008"
    shutil.copytree(checkpoint, tmp_path / "best")
    for path in (checkpoint, tmp_path / "best"):
        opened = train.open_model(path)
        assert opened.config == tiny() and opened.model is train.GPT and same_tokenizer(opened, tokenizer)
        expected = {name: raw for name, (_, _, raw) in read_arrays(checkpoint, "params").items()}
        assert {f"params.{name}": a.tobytes() for name, a in flatten(opened.params).items()} == expected


def test_an_old_run_opens_as_02s_model(straight, exported, tmp_path):
    """Until 2026-11-21 config.json named no model, and a checkpoint had its settings alone; an export is as it was."""
    shutil.copytree(straight[0].run_dir, tmp_path / "run")
    for path in tmp_path.rglob("onechip.json"):
        path.unlink()
    for path in (*tmp_path.rglob("checkpoints/*/tokenizer.json"), tmp_path / "run" / "tokenizer.json"):
        path.unlink()
    for path in (tmp_path / "run" / "config.json", tmp_path / "run" / "model" / "config.json"):
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model"}))
    for path in (tmp_path / "run" / "model", tmp_path / "run" / "checkpoints" / "step_00000026"):
        opened = train.open_model(path)
        assert opened.config == tiny() and opened.model is train.GPT and same_params(opened, straight[0].params)


def test_a_hub_repository_opens(hub, straight, corpus, tokenizer, exported, tmp_path):
    """One that an export was uploaded to, and one that a run in progress keeps its checkpoints in."""
    assert upload_folder(exported, names_of_files(exported), TOKEN, "someone/exported")
    opened = train.open_model("someone/exported")
    assert opened.config == tiny() and opened.model is train.GPT
    assert same_params(opened, straight[0].params) and same_tokenizer(opened, tokenizer)
    cut = train_tiny(corpus, tokenizer, tmp_path, on_log=stop_at_once, mirror=Mirror(HubPlace(TOKEN, "someone/run")))
    opened = train.open_model("someone/run")
    assert cut.step < 26 and opened.config == tiny() and opened.model is train.GPT
    assert same_params(opened, cut.params) and same_tokenizer(opened, tokenizer)
    assert not hub.count("GET", "resolve/.*checkpoints/"), "what resumes a run is three times as large"


def test_a_model_that_no_notebook_defines_is_handed_in(straight, tmp_path):
    """config.json names it, and nothing of that name is imported."""
    folder = tmp_path / "run"
    shutil.copytree(straight[0].run_dir, folder)
    edit_json(newest(folder) / "onechip.json", model="test_02_export.MINE")
    mine = train.GPT._replace(name="test_02_export.MINE")
    assert train.open_model(folder, model=mine).model is mine


def test_a_rescued_checkpoint_is_exported(straight, tokenizer, tmp_path, monkeypatch):
    """The run's disk was away at its end, and works again: the newest weights, whether the run has older ones or none.

    Where it is still away, a line says where they are.
    """
    monkeypatch.setenv("ONECHIP_HOME", str(tmp_path / "home"))
    folder = tmp_path / "run"
    shutil.copytree(straight[0].run_dir, folder, ignore=shutil.ignore_patterns("model"))
    result = straight[0]._replace(run_dir=folder)
    os.renames(newest(folder), rescue_folder(folder) / "step_00000026")
    for _ in range(2):
        assert same_params(train.open_model(train.export_model(result, tokenizer)), straight[0].params)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(folder / "model")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"run/model: cannot be written to \(.*\); the weights are in ") as raised:
        train.export_model(result, tokenizer)
    assert str(rescue_folder(folder) / "step_00000026") in str(raised.value) and is_one_line(raised.value, 500)


def test_an_interrupt_before_the_first_evaluation_still_exports(corpus, tokenizer, tmp_path, monkeypatch):
    """There is no curve and no score yet; the folder opens all the same. Before the first step there is no model."""
    config = tiny(save_every=0, eval_every=20)
    cut = train_tiny(corpus, tokenizer, tmp_path / "run", on_log=stop_at_once, config=config)
    assert 0 < cut.step < 20 and cut.val_loss is None and list_checkpoints(cut.run_dir) == [f"step_{cut.step:08d}"]
    folder = train.export_model(cut, tokenizer)
    assert names_of_files(folder) == [
        "README.md", "config.json", "params.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert "| held-out text | not evaluated yet |" in (folder / "README.md").read_text()
    assert same_params(train.open_model(folder), cut.params)
    monkeypatch.setattr(session.Session, "continues", lambda run: False)
    none = train_tiny(corpus, tokenizer, tmp_path / "none")
    with pytest.raises(UserError, match="^model='.*none': has no checkpoint yet") as raised:
        train.export_model(none, tokenizer)
    assert none.step == 0 and is_one_line(raised.value)


# ----------------------------------------------------------------------------------------------------------------------
# Another notebook's model


@pytest.fixture(scope="module")
def gated(corpus, tokenizer, tmp_path_factory):
    """(config, Result) of six steps of 04's model."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "head_dim": 8, "mlp_dim": 40, "tile": 1}
    shared = {name: value for name, value in TINY.items() if name in train.TrainConfig.__dataclass_fields__}
    config = maxtext.Config(**shared | sizes | {"num_iterations": 6})
    folder = tmp_path_factory.mktemp("gated") / "run"
    return config, train_tiny(corpus, tokenizer, folder, config=config, model=maxtext.SWIGLU, prompts=PROMPTS)


@pytest.mark.parametrize("what", ["run", "checkpoint", "plain export", "Qwen3 export", "Hub repository"])
def test_the_gated_model_opens_by_the_name_that_a_run_keeps(gated, tokenizer, tmp_path, what, hub):
    """From each kind of folder: its own config, its parameters to the last bit, and the samples of its end."""
    config, result = gated
    folder = tmp_path / "run"
    shutil.copytree(result.run_dir, folder, ignore=shutil.ignore_patterns("model"))
    copied = result._replace(run_dir=folder)
    source = {
        "run": lambda: folder,
        "checkpoint": lambda: newest(folder),
        "plain export": lambda: train.export_model(copied, tokenizer),
        "Qwen3 export": lambda: maxtext.export_qwen3(config, copied, tokenizer),
        "Hub repository": lambda: maxtext.export_qwen3(config, copied, tokenizer),
    }[what]()
    if what == "Hub repository":
        upload_folder(source, names_of_files(source), TOKEN, "someone/qwen3")
        shutil.rmtree(folder)
        source = "someone/qwen3"
    opened = train.open_model(source)
    assert opened.model is maxtext.SWIGLU and opened.config == config
    assert same_params(opened, result.params)
    assert train.make_sample_writer(*opened[::2], PROMPTS, opened.model)(opened.params) == result.samples


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture
def folder(straight, exported, tmp_path):
    """A copy of the export, to be spoiled."""
    return shutil.copytree(exported, tmp_path / "model")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    arrays = load_file(folder / "params.safetensors")
    change(arrays)
    save_file(arrays, folder / "params.safetensors")


def refuse(source, said):
    """Checks that open_model refuses `source` in one line that matches."""
    with pytest.raises(UserError, match=said) as raised:
        train.open_model(source)
    assert is_one_line(raised.value, 600)


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "../x.Y", "01_tokenizer.SPECIAL_TOKENS", "01_tokenizer.tok.X", "02_train.Config", "02_train.ADAMW",
        "02_train.NO_SUCH", "02_train.__dict__", "99_none.GPT", "02_train", "02_train.", ".GPT", "", None, 5,
        ["02_train.GPT"], "02_train.GPT\n", "02_train.GPT; import os", "x" * 9999,
    ],
    ids=lambda name: repr(name)[:30],
)  # fmt: skip
def test_only_a_notebooks_constant_is_a_model(folder, name, tmp_path):
    """config.json may come from anybody: nothing else is imported by what it says."""
    (tmp_path / "x.py").write_text("raise SystemExit('imported')")
    (folder / "99_none.py").write_text("raise SystemExit('imported')")
    edit_json(folder / "config.json", model=name)
    refuse(folder, "^model=.*: .*(no notebook here has it|no such model)")
    edit_json(folder / "config.json", model="02_train.GPT")
    assert train.open_model(folder).model is train.GPT


SPOILED = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "^model=.*model': has no config"),
    "no weights": (lambda folder: (folder / "params.safetensors").unlink(), "^model=.*model': has no weights"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "^model=.*model': has no tokenizer"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: is not JSON"),
    "JSON, a list": (lambda folder: (folder / "config.json").write_text("[1]"), "config.json: .* not an object"),
    "deep JSON": (lambda folder: (folder / "config.json").write_text("[" * 200_000), "config.json: is not JSON"),
    "config a list": (lambda folder: edit_json(folder / "config.json", config=[1, "a"]), r"^config=\[1, 'a'\]"),
    "config a text": (lambda folder: edit_json(folder / "config.json", config="GPT"), "^config='GPT'"),
    "an unknown field": (
        lambda folder: edit_json(folder / "config.json", config={**TINY, "n_heads": 4}),
        "config.json='n_heads': Config has no",
    ),
    "a value of another type": (
        lambda folder: edit_json(folder / "config.json", config={**TINY, "n_head": "2"}), "^n_head='2'",
    ),
    "a value that cannot be": (
        lambda folder: edit_json(folder / "config.json", config={**TINY, "seq_len": -1}), "^seq_len=-1",
    ),
    "other sizes": (
        lambda folder: edit_json(folder / "config.json", config={**TINY, "n_kv_head": 2}), r"c_k \(16, 1, 8\)",
    ),
    "a missing array": (
        lambda folder: edit_weights(folder, lambda arrays: arrays.pop("layers.1.c_q")), r"layers\.1\.c_q.*missing",
    ),
    "an array too many": (
        lambda folder: edit_weights(folder, lambda arrays: arrays.update(x=np.zeros(2))), "'x': the model has no such",
    ),
    "damaged weights": (
        lambda folder: os.truncate(folder / "params.safetensors", 99), "params.safetensors: .*safetensors",
    ),
    "a damaged tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILED)
def test_what_is_not_whole_is_refused_in_one_line(folder, kind):
    """The file or the field, and what is wrong with it."""
    spoil, said = SPOILED[kind]
    spoil(folder)
    refuse(folder, said)


def test_a_qwen3_export_that_is_not_whole_is_refused_in_one_line(gated, tokenizer, tmp_path):
    """Names are Hugging Face's there; the line names ours or theirs, and what to do."""
    config, result = gated
    shutil.copytree(result.run_dir, tmp_path / "run")
    folder = maxtext.export_qwen3(config, result._replace(run_dir=tmp_path / "run"), tokenizer)
    arrays = load_file(folder / "model.safetensors")
    for change in (
        lambda a: a.pop("model.layers.1.mlp.gate_proj.weight"),
        lambda a: a.pop("lm_head.weight"),
        lambda a: a.update({"model.embed_tokens.weight": np.zeros((3, 16), np.float32)}),
        lambda a: a.update({"model.layers.0.self_attn.q_proj.weight": np.zeros((3, 16), np.float32)}),
    ):
        spoiled = dict(arrays)
        change(spoiled)
        save_file(spoiled, folder / "model.safetensors")
        refuse(folder, "model.safetensors: not the arrays of this model|the model has")
    edit_json(folder / "onechip.json", model="02_train.GPT", config={})
    refuse(folder, "^model='02_train.GPT': does not read the format of .*model.safetensors")


def test_what_is_no_model_is_refused_in_one_line(hub, tmp_path):
    """An empty folder, no folder, a name that the Hub cannot have, a repository that is not there or is no model."""
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "^model=.*empty': has no config")
    for source in (tmp_path / "nowhere", "a/b/c", "no such folder", "../x", "someone/x y"):
        refuse(source, "^model=.*: no such folder, nor a repository")
    refuse("someone/nothing", "^someone/nothing: no folder, and cannot be downloaded")
    hub.add_repo("someone/data", {"README.md": b"# data"})
    refuse("someone/data", "^model='someone/data': has no config")


# ----------------------------------------------------------------------------------------------------------------------
# The card, after a run of the command

SMALL = (
    "--n_head 2 --head_dim 16 --aspect_ratio 16 --seq_len 64 --vocab_size 512 --device_batch_size 2 "
    "--total_batch_size 4 --num_iterations 12 --eval_tokens 2048 --data offline --name shown"
).split()
SECRET = "hf_secret_word"


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory):
    """(hub, folder with what arrived there) of a run of 02 with a token."""
    folder = tmp_path_factory.mktemp("uploaded")
    with Hub(users={SECRET: "someone"}) as hub:
        environment = os.environ | hub.environment() | {"HF_TOKEN": SECRET}
        command = [sys.executable, str(ROOT / "02_train.py"), *SMALL, "--out", str(folder / "runs")]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        for name, raw in hub.files("someone/onechip-shown").items():
            if "/" not in name:
                (folder / name).write_bytes(raw)
        yield hub, folder


@pytest.mark.slow
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
    assert '"n_head": 2' in text and SECRET not in text


@pytest.mark.slow
def test_the_lines_of_the_card_run(uploaded, tmp_path):
    """Copied as they are, on a machine that has only a clone: they fetch the model and write what the card shows."""
    hub, folder = uploaded
    text = (folder / "README.md").read_text()
    [lines] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert lines.count("\n") == 5 and "'someone/onechip-shown'" in lines
    home = {"HF_HOME": str(tmp_path), "ONECHIP_HOME": str(tmp_path), "HF_TOKEN": SECRET}
    environment = os.environ | hub.environment() | home
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = dict(re.findall(r"^('.*?') -> (['\"].*)$", text, re.MULTILINE))
    assert done.stdout == "import " + ast.literal_eval(shown["'import '"]) + "\n"
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.slow
def test_transformers_loads_the_tokenizer(exported):
    """The same ids, a special token that is spelled out in a text stays text, and <|bos|> is known by its role."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    ours = tok.load_tokenizer(exported / "tokenizer.json")
    for text in ("def f(x):\n\n    return  x  # héé 12345", "a <|bos|> in a text . ' s"):
        ids = theirs(text)["input_ids"]
        assert [ours.token_to_id("<|bos|>"), *ids] == tok.encode_batch(ours, [text])[0]
        assert theirs.decode(ids) == text
    assert (theirs.bos_token, len(theirs)) == ("<|bos|>", 300)
