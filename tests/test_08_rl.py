"""08: the loss of a step next to a whole batch's, where gradients must be 0, that it learns, resumes and refuses."""

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from corpus import assert_same_end, newest, read_arrays, read_rows, tiny
from execute import TINY as FLAGS
from execute import train_before
from letters import LETTERS, SPECIAL, LetterTokenizer

from onechip.errors import UserError
from onechip.policy import Policy, policy_loss
from onechip.rollouts import AnswerLimits, rollout_batch
from onechip.verifiable import Problem

train = importlib.import_module("02_train")
rl = importlib.import_module("08_rl")
pytestmark = pytest.mark.usefixtures("compiled_once", "interruptible")

VOCAB = len(LETTERS) + len(SPECIAL)
CONFIG = tiny(
    vocab_size=VOCAB, seq_len=48, total_batch_size=48, device_batch_size=24, num_iterations=10, eval_every=4,
    save_every=3, learning_rate=2e-2, loss_slice=100,
)  # fmt: skip


class Letters(LetterTokenizer):
    """Letters, as 02's checks want them."""

    def get_vocab_size(self):
        return VOCAB

    def to_str(self, pretty=False):
        return json.dumps({"model": {"vocab": LETTERS, "merges": []}, "pre_tokenizer": None, "added_tokens": SPECIAL})


def vowels(text):
    """The share of a text's letters that are a vowel."""
    return sum(letter in "aeiou" for letter in text) / max(len(text), 1)


def make_task(config=CONFIG, grade=vowels, **settings):
    run = rl.RewardRun(**{"answers": 8, "places": 16, "asked": 5, "tries": 4, "problems": "letters", **settings})
    tokenizer, limits = Letters(), AnswerLimits(12, 24)
    mesh = train.make_mesh(jax.local_devices()[:1])
    policy = Policy(run.algorithm, run.clip, run.kl, limits.answer_tokens)
    problem = lambda number, held_out=False: Problem("abcdefgh"[number % 8], grade)
    roller = rl.make_roller(config, train.GPT, mesh, tokenizer, limits, run.places)
    setup = rl.Setup(problem, tokenizer, roller, run, policy, limits)
    return rl.learning_by_reward(config, setup, lambda: train.init_params(config, jax.random.key(config.param_seed)))


def run_task(folder, config=CONFIG, grade=vowels, on_log=None, **settings):
    task, mesh = make_task(config, grade, **settings), train.make_mesh(jax.local_devices()[:1])
    return train.train(config, task, folder, mesh=mesh, on_log=on_log, draw=rl.plot_rewards, traced=1)


# ----------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.fixture(scope="module")
def rolled():
    """(parameters, batch) of one step's rollouts, by parameters that are not those that the loss is taken at."""
    task = make_task()
    mesh = train.make_mesh(jax.local_devices()[:1])
    params = train.init_params(CONFIG, jax.random.key(3))
    other = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    asked, _ = next(task.batches(None))
    (batch,), figures = task.roll(CONFIG, train.GPT, mesh)(other, asked)
    assert set(batch) == set(task.arrays) and figures["rollouts/off_by"] < 1e-5
    return params, batch, np.repeat(np.arange(6), 8)


@pytest.mark.parametrize("algorithm", ["reinforce", "grpo"])
@pytest.mark.slow
def test_a_step_is_the_gradient_of_the_whole_batchs_policy_loss(rolled, algorithm):
    """By `forward`'s logits and one function of log-probabilities, rewards and mask: two microbatches of unlike masks,
    whose groups lie across, add up to it in value and in gradient."""
    params, batch, groups = rolled
    rewards = np.float64(batch["advantage"][:, 0])  # of mean 0 in a group: their own advantages
    policy = Policy(algorithm, 0.01, 0.2, 24)
    order = np.random.default_rng(0).permutation(48)
    batch = {name: array[order] for name, array in batch.items()}
    rewards, groups = rewards[order], groups[order]
    reference = batch["old"] - 0.1 * np.cos(np.arange(batch["old"].size)).reshape(batch["old"].shape)

    def whole(params):
        logp = jax.nn.log_softmax(train.forward(CONFIG, params, batch["x"]))
        logp = jnp.take_along_axis(logp, batch["y"][..., None], axis=-1)[..., 0]
        return policy_loss(policy, logp, batch["old"], reference, rewards, batch["mask"], groups)

    value, grads = jax.value_and_grad(whole)(params)
    rollouts = [FakeRollout(batch, i, rewards[i], groups[i]) for i in range(48)]
    again = rollout_batch(rollouts, batch["x"].shape[1], 0, policy)
    batch = batch | {"advantage": again["advantage"], "weight": again["weight"], "reference": np.float32(reference)}
    sgd = train.Optimizer("sgd", lambda *_: (), lambda c, w, p, s, g, *rest: (jax.tree.map(jnp.subtract, p, g), s))
    config, mesh = dataclasses.replace(CONFIG, grad_clip=0.0), train.make_mesh(jax.local_devices()[:1])
    state = train.init_state(config, mesh, optimizer=sgd) | {"params": jax.tree.map(jnp.copy, params)}
    step = train.make_train_step(config, mesh, optimizer=sgd, loss=functools.partial(rl.rollout_loss, policy))
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4, atol=1e-7)
    moved = jax.tree.map(jnp.subtract, params, state["params"])
    scale = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * scale), moved, grads)
    assert scale > 0


class FakeRollout:
    """What rollout_batch reads of a row of a batch."""

    def __init__(self, batch, i, reward, group):
        self.prompt, self.tokens = batch["x"][i, :1].tolist(), batch["y"][i].tolist()
        self.mask, self.log_probabilities = batch["mask"][i].tolist(), batch["old"][i].tolist()
        self.reward, self.group = reward, group


def test_prompts_and_tools_have_no_gradient(rolled):
    """That of the hidden state, which logits come from, is exactly 0 where the target was not the model's choice."""
    params, batch, _ = rolled
    probe = jnp.zeros((*batch["x"].shape, CONFIG.n_embd))
    readout = lambda config, params, streams: train.GPT.readout(config, params, streams) + params["probe"]
    model = train.GPT._replace(readout=readout)
    batch = batch | {"reference": batch["old"] - 0.3}
    for policy in (Policy(), Policy("grpo", 0.2, 0.1), Policy("dr-grpo")):
        loss = lambda probe, policy=policy: rl.rollout_loss(policy, CONFIG, model, params | {"probe": probe}, batch)
        found = np.asarray(jax.grad(loss)(probe))
        assert not found[batch["mask"] == 0].any()
        if policy.algorithm == "reinforce":  # elsewhere a ratio that is clipped has none either
            counted = (batch["mask"] == 1) & (batch["advantage"] != 0)
            assert np.abs(found[counted]).max(axis=-1).min() > 0


# ----------------------------------------------------------------------------------------------------------------------
# The loop


@pytest.mark.slow
def test_it_learns_and_resumes_to_the_last_bit(tmp_path):
    """Rewards rise; a run that is cut between two checkpoints ends as one that was not, its draws included."""
    run_task(tmp_path / "straight")

    def stop(row):
        if row["step"] == 5 and "loss" in row:
            raise KeyboardInterrupt

    assert run_task(tmp_path / "cut", on_log=stop).step < 10
    run_task(tmp_path / "cut")
    assert_same_end(tmp_path / "cut", tmp_path / "straight")
    rows = read_rows(tmp_path / "straight")
    reward = [row["rollouts/reward"] for row in rows if "loss" in row]
    assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.05, reward
    assert {"val_loss", "tasks/pass@1", "tasks/pass@4", "tasks/kl"} <= set(rows[-1]) and rows[-1]["tasks/kl"] > 0
    assert max(row["rollouts/off_by"] for row in rows if "loss" in row) < 1e-4
    assert (tmp_path / "straight" / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize("grade", [lambda text: 0.0, lambda text: 1.0], ids=["never", "always"])
@pytest.mark.slow
def test_a_checker_that_does_not_look_changes_nothing(tmp_path, capsys, grade, monkeypatch):
    """Everything wrong, or everything right: the weights stay as they were, bit for bit, and a line says why. Answers
    of a random model are cut off now and then, which is no checker's business: here that is not looked at."""
    inner = rl.Roller._graded

    def graded(self, answer, problem, group):
        answer.reason = "stop"
        return inner(self, answer, problem, group)

    monkeypatch.setattr(rl.Roller, "_graded", graded)
    monkeypatch.setattr("onechip.rollouts.is_forged", lambda *_: False)
    config = dataclasses.replace(CONFIG, num_iterations=6, eval_every=0, save_every=0, weight_decay=0.0)
    result = run_task(tmp_path, config, grade=grade)
    rows = [row for row in read_rows(tmp_path) if "loss" in row]
    assert {row["rollouts/reward"] for row in rows} == {grade("")} and {row["loss"] for row in rows} == {0.0}
    fresh = train.init_state(config, train.make_mesh(jax.local_devices()[:1]))["params"]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, result.params, fresh)))
    assert capsys.readouterr().out.count("nothing is learned") == 1


@pytest.mark.slow
def test_several_updates_with_a_reference(tmp_path):
    """Two updates a step by a clipped ratio move the weights further than one; the distance is logged at each step."""
    config = dataclasses.replace(CONFIG, num_iterations=2, eval_every=0, save_every=0)
    ends = {}
    for updates in (1, 2):
        run_task(tmp_path / str(updates), config, algorithm="grpo", kl=0.1, updates=updates)
        rows = [row for row in read_rows(tmp_path / str(updates)) if "loss" in row]
        assert rows[0]["rollouts/kl"] == pytest.approx(0, abs=1e-6) and rows[1]["rollouts/kl"] > 0
        assert int(rows[-1]["step"]) == 2
        ends[updates] = rows[1]["rollouts/kl"]
        assert read_arrays(newest(tmp_path / str(updates)))
    assert ends[2] > 1.5 * ends[1]


# ----------------------------------------------------------------------------------------------------------------------
# What is chosen


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no chat yet to improve: uv run 07_chat.py first"):
        rl.find_base(f"--out {tmp_path}")
    config = tiny(total_batch_size=12)
    for settings, message in (
        ({"answers": 5}, "answers=5: must divide total_batch_size=12"),
        ({"answers": 1}, "answers=1: one answer has nothing to be compared with"),
        ({"answers": 4, "updates": 2}, "updates=2: reinforce has no ratio"),
        ({"answers": 4, "kl": 0.1, "temperature": 0.7}, "kl=0.1: its estimate is of answers drawn at temperature 1"),
    ):
        with pytest.raises(UserError, match=message):
            rl.check_sizes(rl.RewardRun(**settings), config)
    with pytest.raises(UserError, match="answer_tokens=20: with question_tokens, 30 in all, it must fit seq_len=24"):
        rl.batch_width(config, AnswerLimits(10, 20))
    with pytest.raises(UserError, match="position="):
        next(rl.numbered_batches(config, {"next": -1}))


def test_other_settings_are_another_run():
    """What a run learns from is in its data's revision, which a resume compares."""
    revisions = {make_task(**s).origin["data"]["revision"] for s in ({}, {"seed": 1}, {"algorithm": "grpo"}, {})}
    assert len(revisions) == 3


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A folder with runs of 02 and 07, the smallest."""
    folder = tmp_path_factory.mktemp("chats")
    train_before("08_rl", folder)
    return folder


@pytest.mark.slow
def test_the_command_improves_a_chat(chats):
    """From a pretrained model over a chat to a run: before, after, samples, a model; once more trains nothing."""
    words = [sys.executable, str(ROOT / "08_rl.py"), *FLAGS["08_rl"].split()]
    run = lambda: subprocess.run(words, cwd=chats, capture_output=True, text=True, env=os.environ, timeout=400)
    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\nbefore: pass@1 0." in done.stdout and "\nafter: pass@1 0." in done.stdout
    assert "user: " in done.stdout and "(reward 0.00)" in done.stdout
    (folder,) = chats.glob("runs/rl-chat-*")
    card = (folder / "model" / "README.md").read_text()
    assert "nats per token" not in done.stdout + card and "held-out problems (arithmetic)," in card
    again = run()
    assert again.returncode == 0 and "continues after step 2 of 2" in again.stdout, again.stderr[-2000:]


@pytest.mark.slow
def test_03_sweeps_it(chats, tmp_path, monkeypatch, capsys):
    """Two trials begin with the same chat, differ in their rate, and the better one is named by 08's command."""
    monkeypatch.setattr("sys.argv", ["03_worker.py"])
    monkeypatch.setattr(rl, "LAPTOP_SIZES", {"answers": 4, "question_tokens": 48, "answer_tokens": 16, "places": 8})
    monkeypatch.setattr(rl, "WATCHED", 4)
    (base,) = chats.glob("runs/chat-*")
    worker = importlib.import_module("03_worker")
    sizes = (
        "--num_iterations 2 --evaluations 1 --total_batch_size 8 --device_batch_size 8 --any_version true --run_cap 2"
    )
    backend, _, material = worker.open_sweep(
        f"--task rl --preset laptop {sizes} --base {base} --out {tmp_path} --name s"
    )
    backend.work(material)
    trials = backend.trials()
    assert [trial["state"] for trial in trials] == ["finished"] * 2
    assert all("tasks/pass@1" in row and 0 <= row["val_loss"] <= 1 for trial in trials for row in trial["rows"])
    assert len({trial["parameters"]["learning_rate"] for trial in trials}) == 2
    worker.show_results(backend)
    assert f"best: uv run 08_rl.py --model {base} --" in capsys.readouterr().out
    with pytest.raises(UserError, match="mixture='calculator:4': belongs to --task chat"):
        worker.open_sweep(f"--task rl --preset laptop --mixture calculator:4 --base {base} --out {tmp_path}")
