"""07: what fine-tuning learns from, where it begins, that its mask is worth something, how questions are asked."""

import dataclasses
import functools
import gc
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from conftest import ROOT
from corpus import TINY, assert_same_end, newest, read_arrays, read_rows, tiny, train_tiny
from execute import TINY as FLAGS
from execute import train_before
from letters import CONFIG as CONFIG_OF_LETTERS
from letters import SCRIPTED, TOKENS, LetterTokenizer, script_of, script_params

from onechip.conversations import assistant_parts, chat_tokens, render_conversation, render_prompt
from onechip.errors import UserError
from onechip.export import find_model_files
from onechip.mixture import Mixture, TalkSource
from onechip.runfolder import newest_run
from onechip.warmstart import count_steps_before, has_moments, load_start

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")
speedrun = importlib.import_module("05_speedrun")
chat = importlib.import_module("07_chat")
pytestmark = pytest.mark.usefixtures("compiled_once", "interruptible")

ANSWERS = {"a": "water", "b": "light", "c": "energy", "d": "plant"}
CONFIG = tiny(seq_len=48, num_iterations=20, eval_every=8, save_every=6, eval_tokens=480)


def toy_messages(seed, number, most=6):
    """A question of two to `most` letters that say nothing and one that decides the answer."""
    rng = random.Random(f"{seed} {number}")
    key = rng.choice("abcd")
    said = " ".join([*rng.choices("efghijklmnopqrstuvwxyz", k=rng.randint(2, most)), key])
    return [{"role": "user", "content": said}, {"role": "assistant", "content": ANSWERS[key]}]


TOY = TalkSource("toy", functools.partial(toy_messages, 1), functools.partial(toy_messages, 2))


def toy_task(config, tokenizer, source=TOY):
    return chat.fine_tuning(config, [source], {source.name: 40}, tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# The task


def reference_loss(config, params, batch):
    """Mean cross-entropy over the targets that count, in float64, from `forward`'s logits."""
    logits = np.asarray(train.forward(config, params, batch["x"]), np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["y"][..., None], -1)[..., 0]
    return (nats * batch["mask"]).sum() / batch["mask"].sum()


@pytest.mark.slow
def test_a_step_reports_the_loss_of_a_supervised_token(tokenizer):
    """Over the whole batch of three microbatches whose targets differ in number; the held-out loss as well."""
    task = toy_task(CONFIG, tokenizer)
    uneven = lambda batch: len(set(batch["mask"].reshape(3, -1).sum(axis=1))) > 1
    batch = next(batch for batch, _ in task.batches(None) if uneven(batch))
    assert set(batch) == set(task.arrays) and all(array.shape == (6, 48) for array in batch.values())
    params = train.init_params(CONFIG, jax.random.key(3))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    mesh = train.make_mesh(jax.local_devices()[:1])
    state = train.init_state(CONFIG, mesh) | {"params": jax.tree.map(jnp.copy, params)}
    _, metrics = train.make_train_step(CONFIG, mesh)(state, batch)
    assert float(metrics["loss"]) == pytest.approx(reference_loss(CONFIG, params, batch), rel=1e-5)

    rows = Mixture([TOY], {"toy": 40}, held_out=True)
    ids, mask, _ = next(chat.packed_conversations(rows, chat_tokens(tokenizer), 10, 49))
    scores = task.score(CONFIG, train.GPT, mesh)(params)
    assert scores["val_loss"] == pytest.approx(reference_loss(CONFIG, params, chat.masked_batch(ids, mask)), rel=1e-5)
    assert scores["val_bpb"] > 0


def test_what_the_data_is_made_from_is_in_its_revision(tokenizer):
    """Another count, another commit or another base is other data, which a run refuses to resume with."""
    revisions = set()
    for counts, origin in (({"toy": 40}, None), ({"toy": 41}, None), ({"toy": 40}, {"base": "x"})):
        task = chat.fine_tuning(CONFIG, [TOY], counts, tokenizer, origin=origin)
        assert task.origin["data"]["name"] == "conversations"
        revisions.add(task.origin["data"]["revision"])
    assert len(revisions) == 3


@pytest.mark.slow
def test_it_resumes_to_the_last_bit(tokenizer, tmp_path):
    """Interrupted in the middle, between two checkpoints, a run ends as one that was not."""
    task = toy_task(CONFIG, tokenizer)
    train.train(CONFIG, task, tmp_path / "straight")

    def stop(row):
        if row["step"] == 11 and "loss" in row:
            raise KeyboardInterrupt

    result = train.train(CONFIG, task, tmp_path / "cut", on_log=stop)
    assert result.step < 20
    train.train(CONFIG, task, tmp_path / "cut")
    assert_same_end(tmp_path / "cut", tmp_path / "straight")
    assert {"padding", "val_loss"} <= set(read_rows(tmp_path / "cut")[-1])


# ----------------------------------------------------------------------------------------------------------------------
# Where it begins


@pytest.fixture(scope="module")
def base(corpus, tokenizer, tmp_path_factory):
    """A pretrained run of 5 steps with 48 tokens of context, after 3 steps before."""
    folder = tmp_path_factory.mktemp("bases") / "base"
    config = tiny(seq_len=48, num_iterations=5, eval_every=0, save_every=0, eval_tokens=240, steps_before=3)
    train_tiny(corpus, tokenizer, folder, config=config)
    return folder


def shapes_of(config, model=train.GPT, optimizer=train.ADAMW):
    return train.state_shapes(config, train.make_mesh(jax.local_devices()[:1]), model, optimizer)


@pytest.mark.slow
def test_it_begins_with_weights_and_moments(base):
    """Those of the newest checkpoint, bit for bit, at step 0; how many steps the moments have seen is known."""
    files = find_model_files(base)
    assert has_moments(files, train.ADAMW) and count_steps_before(files, train.ADAMW) == 8
    state = load_start(files, CONFIG, train.GPT, train.ADAMW, shapes_of(CONFIG))
    assert int(state["step"]) == 0 and state["step"].dtype == jnp.int32
    stored = read_arrays(newest(base))
    mine = {f"{k}.{name}": leaf for k in ("params", "opt") for name, leaf in train_names(state[k]).items()}
    assert {name: np.asarray(leaf).tobytes() for name, leaf in mine.items()} == {n: a[2] for n, a in stored.items()}
    assert any(np.asarray(leaf).any() for name, leaf in mine.items() if name.startswith("opt."))


def train_names(tree):
    """{dotted name: array} of a state's pytree."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def test_without_moments_the_optimizer_begins_with_its_own(base, tokenizer, tmp_path):
    """An export, and another optimizer than the run's: the weights are the same, the moments zero."""
    train.export_model(FakeResult(base), tokenizer)
    for source, optimizer in ((base / "model", train.ADAMW), (base, speedrun.MUON)):
        config = train.config_with(train.Config, optimizer.settings)(
            **{name: value for name, value in dataclasses.asdict(CONFIG).items() if name not in MUONS}
        )
        files = find_model_files(source)
        assert not has_moments(files, optimizer) and count_steps_before(files, optimizer) == 0
        state = load_start(files, config, train.GPT, optimizer, shapes_of(config, optimizer=optimizer))
        assert not any(leaf.any() for leaf in jax.tree.leaves(state["opt"]))
        weights = {n.removeprefix("params."): a[2] for n, a in read_arrays(newest(base), "params").items()}
        assert {name: np.asarray(leaf).tobytes() for name, leaf in train_names(state["params"]).items()} == weights


MUONS = {field.name for field in dataclasses.fields(speedrun.MuonSettings)}


@dataclasses.dataclass
class FakeResult:
    """What export_model asks of a Result."""

    run_dir: object
    step: int = 5
    val_loss: float | None = None
    val_bpb: float | None = None
    gzip_bpb: float | None = None
    samples: tuple = ()
    params: tuple = ()


@pytest.mark.parametrize("optimizer", [train.ADAMW, speedrun.MUON], ids=["adamw", "muon"])
def test_loaded_moments_are_corrected_for_all_steps_they_have_seen(optimizer):
    """Step 0 after 7 steps before is step 7 of one run, at the same rate: not the larger one of empty moments."""
    fields = {**TINY, "warmup_ratio": 0.0, "warmup_steps": 1, "warmdown_ratio": 0.0, "num_iterations": 50}
    if optimizer is speedrun.MUON:  # its own momentum follows this run's steps
        fields |= {"momentum_start": 0.9, "beta1": 0.9, "momentum_end": 0.9, "weight_decay": 0.0}
    config_class = train.config_with(train.Config, optimizer.settings)
    weights = train.GPT.weights(config_class(**fields))
    draw = lambda seed: jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(seed + p.size), p.shape),
        train.init_params(tiny(), jax.random.key(0)),
    )
    params, grads = draw(1), draw(2)
    opt = optimizer.init(config_class(**fields), weights, params)
    opt = jax.tree.map(lambda m: m + 0.3, opt)
    update = lambda before, step: optimizer.update(
        config_class(**fields, steps_before=before), weights, params, opt, grads, jnp.int32(step)
    )
    for ours, theirs in zip(*map(jax.tree.leaves, (update(7, 1), update(0, 8))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    pairs = zip(*map(jax.tree.leaves, (update(0, 1), update(7, 1))), strict=True)
    differ = [not np.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in pairs]
    assert any(differ)


def test_a_run_begins_with_the_model(base, tokenizer, tmp_path):
    """Its first loss is the base's on that batch, not log V; and its checkpoint is one that open_model opens."""
    config = dataclasses.replace(CONFIG, num_iterations=2, eval_every=0, save_every=0, steps_before=8)
    files = find_model_files(base)
    start = functools.partial(load_start, files, config, train.GPT, train.ADAMW)
    task = toy_task(config, tokenizer)
    rows = []
    train.train(config, task, tmp_path / "run", start=start, on_log=rows.append)
    batch, _ = next(task.batches(None))
    expected = reference_loss(config, train.open_model(base).params, batch)
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert train.open_model(tmp_path / "run").config == config


# ----------------------------------------------------------------------------------------------------------------------
# The mask


def right_answers(config, params, tokenizer, count=60):
    """The share of held-out toy questions that a model answers."""
    answer, items = (
        chat.make_answering(config, train.GPT, tokenizer),
        [toy_messages(2, n, most=16) for n in range(count)],
    )
    parts = answer(params, [messages[:1] for messages in items])
    wanted = [[{"type": "text", "text": messages[1]["content"]}] for messages in items]
    return np.mean([a == b for a, b in zip(parts, wanted, strict=True)])


BREAKS = {
    "lost": lambda batch: batch | {"mask": np.ones_like(batch["mask"])},
    "one too early": lambda batch: batch | {"mask": np.pad(batch["mask"], ((0, 0), (0, 1)))[:, 1:]},
}


@pytest.mark.slow
def test_a_broken_mask_costs_answers(tokenizer, tmp_path):
    """The same model, data and steps: with the mask most held-out questions are answered; with one that is lost, or is
    shifted by a token, the loss of the answers is more than twice as high, and fewer are right."""
    config = tiny(seq_len=96, num_iterations=120, eval_every=0, save_every=0, eval_tokens=960, learning_rate=2e-2)
    make = lambda seed: lambda number: toy_messages(seed, number, most=16)
    task = toy_task(config, tokenizer, TalkSource("long", make(1), make(2)))

    def train_with(change, name):
        batches = lambda position: ((change(batch), after) for batch, after in task.batches(position))
        result = train.train(config, task._replace(batches=batches), tmp_path / name)
        return result.val_loss, right_answers(config, result.params, tokenizer)

    loss, right = train_with(lambda batch: batch, "whole")
    broken = {name: train_with(change, name.replace(" ", "-")) for name, change in BREAKS.items()}
    print(f"whole: {loss:.3f} nats, {right:.2f} right;", broken)
    assert right > 0.75
    for broken_loss, broken_right in broken.values():
        assert broken_loss > 2 * loss and broken_right < right - 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Asking


def letters_of(parts):
    return [(part["type"], part["text"]) for part in parts]


@pytest.mark.slow
def test_calls_are_run_and_nothing_is_left_on_the_device():
    """A model that follows a script calls the calculator, twice with other parameters; its memory is given back."""
    say = script_of("it is ", TOKENS.python_start, "7*6", TOKENS.python_end, (4,), " ok", TOKENS.assistant_end, "never")
    refused = script_of(TOKENS.python_start, "import os", TOKENS.python_end, "no", TOKENS.assistant_end)
    asked = [{"role": "user", "content": "how many"}]
    before = [TOKENS.bos] * (len(render_prompt(TOKENS, asked)) - 1)
    answer = chat.make_answering(
        CONFIG_OF_LETTERS, SCRIPTED, LetterTokenizer(), train.make_mesh(jax.local_devices()[:1])
    )
    found = answer(script_params(before + say), [asked] * 70)  # more than there are rows
    assert len(found) == 70 and {str(parts) for parts in found} == {str(found[0])}
    assert letters_of(found[0]) == [("text", "it is "), ("python", "7*6"), ("python_output", "42"), ("text", " ok")]
    gc.collect()
    held = sum(array.nbytes for array in jax.live_arrays())
    assert letters_of(answer(script_params(before + refused), [asked])[0]) == [("python", "import os"), ("text", "no")]
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) <= held


def test_answers_are_those_of_generate(base, tokenizer):
    """Likeliest tokens, prompts of other lengths at once: token for token what 02's generate writes for each alone."""
    config, params, _, model = train.open_model(base)
    config = dataclasses.replace(config, seq_len=128)
    tokens, decode = chat_tokens(tokenizer), functools.partial(tokenizer.decode, skip_special_tokens=False)
    asked = [[{"role": "user", "content": said}] for said in ("the", "import self water", "")]
    found = chat.make_answering(config, model, tokenizer)(params, asked)
    for messages, parts in zip(asked, found, strict=True):
        alone = train.generate(config, params, render_prompt(tokens, messages), chat.ANSWER_AT_MOST)
        assert tokens.python_end not in alone  # the calculator would have been asked
        assert parts == assistant_parts(tokens, alone, decode)


def test_an_answer_is_shown_with_its_calls():
    parts = [("text", "So "), ("python", "1+1"), ("python_output", "2"), ("text", "2.")]
    assert chat.spell_parts([{"type": k, "text": t} for k, t in parts]) == "So [1+1 -> 2] 2."


# ----------------------------------------------------------------------------------------------------------------------
# What is chosen


def test_a_mixture_follows_the_data_and_the_users_file():
    """Their conversations come twice an epoch unless the mixture says how often; own without a file is refused."""
    own = [toy_messages(1, n) for n in range(3)]
    assert chat.choose_counts("spelling:5", "hub", []) == {"spelling": 5}
    assert chat.choose_counts("spelling:5", "hub", own) == {"spelling": 5, "own": 6}
    assert chat.choose_counts("own:50 spelling:5", "hub", own) == {"own": 50, "spelling": 5}
    assert set(chat.choose_counts("", "offline", [])) == set(chat.LESSONS)
    with pytest.raises(UserError, match="own needs a file: --conversations FILE"):
        chat.choose_counts("own:5", "offline", [])
    assert chat.count_steps({"smoltalk": 1000}, 1 << 16) == 14 and chat.count_steps({"spelling": 1}, 1 << 16) == 1


@pytest.mark.parametrize("preset", ["laptop", "chip"])
@pytest.mark.parametrize("model, optimizer", [(train.GPT, train.ADAMW), (speedrun.NANOCHAT, speedrun.MUON)])
def test_rates_are_pretrainings_without_warmup(preset, model, optimizer):
    """0.8 of the base's, none at the start lower than later, down to zero over the last half; Muon's as nanochat has
    them, whatever the batch; on a laptop the base's own; model and batch are the base's."""
    config_class = train.config_with(model.config, optimizer.settings)
    base = config_class(**train.presets_of(model, optimizer)["laptop"])
    fields = chat.tuned_fields(base, model, optimizer, preset, {"spelling": 10_000})
    config = config_class(**fields)
    assert (config.n_layer, config.n_embd, config.total_batch_size) == (base.n_layer, base.n_embd, 8)
    rates = [float(train.learning_rate_at(config, s)) for s in (0, config.num_iterations // 2 - 1)]
    assert rates[0] == rates[1] == pytest.approx(config.learning_rate)
    assert train.learning_rate_at(config, config.num_iterations) == 0 and config.weight_decay == 0
    if preset == "laptop":
        assert config.learning_rate == base.learning_rate
    elif optimizer is speedrun.MUON:
        assert speedrun.group_rate(config, None) == pytest.approx(0.8 * config.matrix_lr)
    else:
        assert config.learning_rate == pytest.approx(0.8 * base.learning_rate)
    if optimizer is speedrun.MUON:
        assert float(speedrun.momentum_at(config, 0)) == pytest.approx(0.85)
        assert float(speedrun.momentum_at(config, 300)) == pytest.approx(0.95)


@pytest.mark.slow
def test_the_newest_run_that_is_no_chat_is_taken(base, tokenizer, tmp_path, capsys):
    """A second start finds the same base, and so the same name of the run: it resumes."""
    out = tmp_path / "runs"
    out.mkdir()
    (out / "pretrained").symlink_to(base)
    words = f"--out {out} --preset laptop --num_iterations 2 --mixture spelling:9"
    chosen = []
    for _ in range(2):
        files, model, optimizer, config = chat.choose_base(words)
        assert (files.source, model, optimizer) == (str(out / "pretrained"), train.GPT, train.ADAMW)
        run, config, counts, own = chat.choose_chat(files, model, optimizer, config, words)
        assert config.steps_before == 8 and counts == {"spelling": 9} and own == []
        chosen.append(run.name)
        small = dataclasses.replace(config, device_batch_size=2, eval_every=0, eval_tokens=96)
        train.train(small, toy_task(small, tokenizer), out / run.name)
    assert chosen[0] == chosen[1] and chosen[0].startswith("chat-pretrained-")
    assert newest_run(out) == str(out / chosen[0])
    with pytest.raises(UserError, match="optimizer='muon': the model was trained with adamw"):
        chat.choose_base(f"{words} --optimizer muon")
    with pytest.raises(UserError, match="data='other': use offline or hub"):
        chat.choose_chat(files, model, optimizer, train.open_model(base).config, f"{words} --data other")


# ----------------------------------------------------------------------------------------------------------------------
# The whole of it


@pytest.mark.slow
def test_the_command_fine_tunes_reports_and_exports(tmp_path):
    """From a base to a chat: accuracies before and after, a transcript, and a tokenizer whose template gives the
    training's own tokens; the same command again trains nothing."""
    import transformers

    train_before("07_chat", tmp_path)
    who = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Ada."}]
    (tmp_path / "me.jsonl").write_text(json.dumps(who))
    words = [sys.executable, str(ROOT / "07_chat.py"), *FLAGS["07_chat"].split(), "--conversations", "me.jsonl"]
    run = lambda: subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=os.environ, timeout=400)
    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\nbefore: calculator 0." in done.stdout and "\nafter: calculator 0." in done.stdout
    assert "user: Who are you?" in done.stdout
    assert "with the moments of 5 steps" in done.stdout
    folder = newest_run(tmp_path / "runs")
    model = tmp_path / "runs" / os.path.basename(folder) / "model"
    assert "It answers questions" in (model / "README.md").read_text()
    theirs, ours = transformers.AutoTokenizer.from_pretrained(model), tok.load_tokenizer(model / "tokenizer.json")
    messages = toy_messages(1, 1)
    assert theirs.apply_chat_template(messages)["input_ids"] == render_conversation(chat_tokens(ours), messages)[0]
    again = run()
    assert again.returncode == 0 and "resuming" in again.stdout, again.stderr[-2000:]

    # What has been fine-tuned is talked to, without a step of training.
    words = [sys.executable, str(ROOT / "07_chat.py"), "--temperature", "0"]
    name = os.path.basename(folder)
    talk = {"input": "What is 3 + 4?\n/new\n", "timeout": 200, "cwd": tmp_path, "env": os.environ}
    talked = subprocess.run([*words, "--talk"], capture_output=True, text=True, **talk)
    assert talked.returncode == 0, talked.stderr[-2000:]
    assert f"talking to {name}: 8 answers at once" in talked.stdout and "a new conversation" in talked.stdout
    assert "step" not in talked.stdout and len(os.listdir(tmp_path / "runs")) == 2
    with subprocess.Popen(
        [*words, "--serve", "--port", "0"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as server:
        found = next(match for line in server.stdout if (match := re.search(r"API: (http://127.0.0.1:\d+/v1)", line)))
        client = openai.OpenAI(base_url=found[1], api_key="none", max_retries=0, timeout=100)
        question = [{"role": "user", "content": "What is 3 + 4?"}]
        chunks = client.chat.completions.create(model=name, messages=question, max_tokens=5, stream=True)
        assert list(chunks)[-1].choices[0].finish_reason in ("stop", "length")
        server.send_signal(signal.SIGINT)
        assert "server: ended" in server.stdout.read() and server.wait(60) == 0
