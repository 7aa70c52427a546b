# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V6E1
#     machine_shape: hm
#     provenance: []
#   jupytext:
#     notebook_metadata_filter: accelerator,colab
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onechip/onechip/blob/main/notebooks/08_rl.ipynb)
# # Better at what can be checked
#
# A chat of 07 imitates answers. Here it learns from its own: it answers each question several times, a rule says which
# answers are right, and those become likelier. Nobody writes a solution, so it can learn what its lessons did not
# have: sums of several steps, where it has only been shown one.
#
# | where | what | steps |
# |---|---|---|
# | laptop, no network | the newest chat, sums of two and three steps by the calculator | 80, about 5 minutes |
# | Colab, TPU v6e | GSM8K, 16 answers to each of 16 questions a step | 467, nanochat's; not timed |
#
# On a laptop, a quarter of all answers to 500 held-out sums are right before, and four of five after.

# %% cellView="form"
# @title Opening cell, the same in every notebook
# On Colab: fetches the repository, installs what the image lacks, looks for the TPU. Elsewhere: finds the repository.
REPOSITORY = "https://github.com/onechip/onechip"
REF = "main"  # @param {type:"string"}
# @markdown REF is the version of the repository's files: a branch, a tag or a full commit hash. A notebook opened from
# @markdown GitHub uses the repository it was opened from, and the branch too unless you set another REF than `main`.
# @markdown To freeze your copy, set REF to the commit in its runs' config.json.


def opened_from():
    """(repository, ref) on github.com that Colab opened this notebook from; None if it does not say within 2 s."""
    import contextlib
    import json
    import os
    import re
    import sys
    from multiprocessing.pool import ThreadPool
    from urllib.parse import unquote
    from urllib.request import urlopen

    place = re.compile(r"(?a)fileId=(https://github\.com/\w[\w-]*/\w[\w.-]*)/blob/(\w[\w./+@-]*)/notebooks/\w+\.ipynb")
    with contextlib.suppress(Exception), ThreadPool(1) as pool:
        url = f"http://{os.environ['COLAB_JUPYTER_IP']}:{os.environ.get('KMP_TARGET_PORT', 9000)}/api/sessions"
        sessions = pool.apply_async(lambda: json.load(urlopen(url, timeout=2))).get(timeout=2)
        mine = [s for s in sessions if s["kernel"]["id"] in " ".join(sys.argv)]  # kernels start with -f kernel-ID.json
        names = [unquote(unquote(str(s.get(key)))) for s in mine or sessions for key in ("path", "name")]
        found = {match.groups() for match in map(place.fullmatch, names) if match}
        return found.pop() if len(found) == 1 else None


def open_notebook(repository, ref):
    """Makes the repository's files importable, without touching any package that is already installed."""
    import os
    import subprocess
    import sys
    from importlib.util import find_spec
    from pathlib import Path
    from urllib.parse import quote

    on_colab = find_spec("google") is not None and find_spec("google.colab") is not None
    folder = next((f for f in (Path.cwd(), Path.cwd().parent) if (f / "01_tokenizer.py").exists()), None)
    if not folder and not on_colab:
        raise RuntimeError(f"no 01_tokenizer.py here or one folder up: open this notebook in a clone of {repository}")
    if not folder:
        opened = None if "ONECHIP_REPO" in os.environ else opened_from()
        if opened:
            repository, ref = opened[0], opened[1] if ref == "main" else ref
        repository, ref = os.environ.get("ONECHIP_REPO", repository), os.environ.get("ONECHIP_REF", ref)
        if repository.startswith("-") or ref.startswith("-"):
            raise RuntimeError(f"REF={ref!r}, repository={repository!r}: neither may begin with a dash")
        print(f"Using {ref} of {repository},", "where this notebook is from." if opened else "as set here.")
        folder = Path(quote(".".join(repository.split("/")[-2:]) + f"@{ref}", safe="@")).resolve()
        if not (folder / "01_tokenizer.py").exists():
            folder.mkdir(exist_ok=True)
            # fetch, not clone --branch: that takes no commit hash
            for step in (["init"], ["fetch", "--depth", "1", repository, ref], ["checkout", "FETCH_HEAD"]):
                command, asking = ["git", "-C", folder, step[0], "-q", *step[1:]], {"GIT_TERMINAL_PROMPT": "0"}
                git = subprocess.run(command, capture_output=True, text=True, env=os.environ | asking)
                if git.returncode:
                    reason = git.stderr.strip().partition("\n")[0]
                    raise RuntimeError(f"cannot fetch {ref!r} of {repository}: {reason}")
    sys.path.insert(0, str(folder))
    if on_colab:
        from onechip.colab import prepare_colab

        prepare_colab()


if "__file__" not in globals():  # a kernel only: scripts and imports find their siblings by themselves
    open_notebook(REPOSITORY, REF)

# %% [markdown]
# ## A reward, and what it is worth
#
# Of four answers to one question two are right. Each answer is worth its reward less the mean of its group: the right
# ones are pushed up, the wrong ones down, and how hard the question is falls out. If all four are right, or all wrong,
# or the checker says yes to everything, nothing can be learned, and nothing is: the advantages are exactly 0, and after
# five such steps a line says so.

# %%
import onechip  # noqa: F401  (before jax: it keeps an idle libtpu quiet)
from onechip.machine import prepare, wants_a_look
from onechip.policy import ALGORITHMS, Policy, group_advantages, kl_estimate, pass_at_k, token_losses_of

LOOK = __name__ == "__main__" and wants_a_look()  # the small checks are for a reader: a script with flags skips them

if LOOK:
    prepare()
    for rewards in ([1, 0, 0, 1], [1, 1, 1, 1]):
        print(f"rewards {rewards}: advantages {group_advantages('reinforce', rewards, [0] * 4)}")
    print(f"pass@1 and pass@4 of two right answers in eight: {pass_at_k(8, 2, 1):.2f} and {pass_at_k(8, 2, 4):.2f}")

# %% [markdown]
# ## Setup
#
# `onechip/verifiable.py` has the problems, `rollouts` draws and grades answers, `policy` has the arithmetic. What is
# spelled `train.something` is explained in 02.

# %%
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from onechip.card import describe_result
from onechip.chips import topology_devices
from onechip.conversations import chat_tokens
from onechip.decoding import Decoder
from onechip.doors import SweepChoice, SweepTask, Task, config_with
from onechip.engine import PROMPT_TOKENS, Engine, blank_turn
from onechip.errors import UserError, require, say
from onechip.estimate import peak_bytes
from onechip.export import names_of_files
from onechip.files import hash_file
from onechip.hosts import gathered, host_count, is_first, on_this_host
from onechip.hub import upload_folder
from onechip.layers import head_log_probabilities
from onechip.machine import read_secret
from onechip.mesh import gather
from onechip.parts import array_files
from onechip.plots import plot_rewards
from onechip.ring import empty_rings
from onechip.rollouts import AnswerLimits, Roller, SameRewards, describe_rollouts, pass_figures, rollout_batch, seed_of
from onechip.runfolder import TOKENIZER, newest_run
from onechip.settings import Run, choose, peek, setting
from onechip.verifiable import open_problems
from onechip.warmstart import load_start
from onechip.weights import bytes_of, cast_weights, weight_shapes

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardRun(Run):
    """What to improve, on which problems, and where to leave it. 0: as suits the preset."""

    model: str = setting("", "a chat's run, an export or a Hub repository; empty: the newest chat")
    data: str = setting("", "offline or hub: where problems come from; empty: as suits the preset")
    problems: str = setting(
        "", "gsm8k, arithmetic, counting, spelling, sorting, with blanks between; empty: by the data"
    )
    algorithm: str = setting("reinforce", "how rewards become a loss", choices=ALGORITHMS)
    answers: int = setting(0, "answers to each question of a step, a group; 0: as suits the preset", at_least=0)
    updates: int = setting(1, "updates by the answers of a step; more than 1 needs grpo or dr-grpo", at_least=1)
    clip: float = setting(0.2, "grpo, dr-grpo: how far a probability's ratio may move", above=0, below=1)
    kl: float = setting(0.0, "weight of the distance to the model that it began with", at_least=0)
    temperature: float = setting(1.0, "how freely answers are drawn, in training and in tests", above=0)
    top_k: int = setting(0, "of so many likeliest tokens; 0: of all", at_least=0)
    question_tokens: int = setting(0, "tokens of a question at most; 0: as suits the preset", at_least=0)
    answer_tokens: int = setting(
        0, "tokens of an answer at most, a tool's included; 0: as suits the preset", at_least=0
    )
    places: int = setting(0, "answers that are written at once; 0: as suits the preset", at_least=0)
    asked: int = setting(500, "held-out problems, before and after", at_least=1)
    tries: int = setting(4, "answers to each of them, for pass@1 and pass@k", at_least=1)
    seed: int = setting(0, "of all that is drawn", at_least=0)


# %% [markdown]
# ## Problems
#
# A problem is a prompt and a grade: a function of what the answer says after its last call, 0 to 1. Which problems are
# held out follows from a hash of what they ask, so no sum of the training is asked in other words afterwards.
#
# Whatever a checker pays for is what a model learns, and it finds what pays without being right. Three such ways are
# closed: a grade wants the one number and nothing else, so that it does not pay to name many; an answer that is cut off
# gets nothing; and so does one in which the model wrote the calculator's output itself, instead of waiting for it.

# %%
PROBLEMS = {"offline": "arithmetic", "hub": "gsm8k"}

if LOOK:
    toy_problem, _ = open_problems(["arithmetic", "counting", "sorting"])
    for number in range(3):
        print(toy_problem(number).prompt)
    held = toy_problem(0, held_out=True)
    print(f"held out: {held.prompt!r}; to name every number gets {held.grade(' '.join(map(str, range(1000)))):.0f}")

# %% [markdown]
# ## Rollouts
#
# The engine of 07 answers all questions of a step at once, each several times, with the parameters that the step begins
# with. What is drawn depends on the step's number and the answer's: a resumed run draws the same answers. Between two
# calls the engine has nothing on the device but its programs: the update has the memory to itself.


# %%
def make_engine(config, model, mesh, limits, places, params):
    """The Engine that answers: rows for `places` texts at least, on the devices of a mesh."""
    rows = -(-places // mesh.size) * mesh.size
    length = limits.question_tokens + limits.answer_tokens
    return Engine(config, params, model, train.attention_parts(config), rows=rows, length=length, mesh=mesh)


def make_roller(config, model, mesh, tokenizer, limits, places):
    """The Roller of a tokenizer's chat."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    engine = functools.partial(make_engine, config, model, mesh, limits, places)
    return Roller(engine, chat_tokens(tokenizer), decode, limits)


def batch_width(config, limits):
    """Tokens of a row of a batch: a question, an answer, and padding to what attention's tiles take."""
    tile = 128 if config.attn_impl in ("splash", "pallas") else 32
    length = limits.question_tokens + limits.answer_tokens
    require(length <= config.seq_len, "answer_tokens", limits.answer_tokens, f"with question_tokens, {length} in all, "
            f"it must fit seq_len={config.seq_len}")  # fmt: skip
    return min(config.seq_len, -(-length // tile) * tile)


# %% [markdown]
# ## The loss
#
# A batch has the answers, a mask of the tokens that the model chose, and for each its advantage and the log-probability
# at which it was drawn. What was asked and what the calculator returned is not the model's doing, and has no gradient.
#
# - `reinforce` (nanochat's): -logp times advantage, every token alike;
# - `grpo`: advantages over their deviation, every answer alike, and a ratio of probabilities that is clipped, so that
#   several updates by the same answers are safe;
# - `dr-grpo`: without both of those normalizations, which favour long wrong answers and questions that are too easy.


# %%
def log_probabilities_of(config, model, params, x, y):
    """(log-probabilities of y, entropies), float32 (B, T), for x, y (B, T) int32; params: cast already."""
    hidden, _ = train.backbone(config, model, params, x)
    return head_log_probabilities(config.softcap, config.loss_slice, hidden, gather(params["lm_head"]), y)


def rollout_loss(policy, config, model, params, batch):
    """The mean loss of a microbatch's chosen tokens, as Task.loss: over a step it adds up to policy_loss."""
    chosen, _ = log_probabilities_of(config, model, params, batch["x"], batch["y"])
    losses = token_losses_of(policy, chosen, batch["old"], batch.get("reference"), batch["advantage"])
    counted = jnp.where(batch["mask"] > 0, batch["weight"] * losses, 0)
    return jnp.sum(counted) / jnp.maximum(jnp.sum(batch["mask"]), 1)


def make_judge(config, model, mesh):
    """A function of (params, batch) -> (log-probabilities, entropies) of its y, NumPy (N, T), as training sees them."""
    split, whole = train.sharding_of(mesh, "B"), PartitionSpec()
    judge = functools.partial(log_probabilities_of, config, model)
    places = {"in_specs": (whole, split.spec, split.spec), "out_specs": split.spec}
    judge = jax.jit(jax.shard_map(judge, mesh=mesh, check_vma=False, **places))
    cast, rows = train.make_caster(config, model, mesh), config.device_batch_size * mesh.size

    def judge_batch(params, batch):
        params, count = cast(params), len(batch["x"])
        fill = lambda array, at: np.pad(array[at : at + rows], ((0, max(0, at + rows - count)), (0, 0)))
        found = [judge(params, fill(batch["x"], at), fill(batch["y"], at)) for at in range(0, count, rows)]
        return [np.concatenate(arrays)[:count] for arrays in zip(*jax.device_get(found), strict=True)]

    return judge_batch


# %% [markdown]
# ## The task
#
# Reinforcement learning is a `Task` of 02's loop, with one function more: `roll` makes a step's batch from the
# parameters that the step begins with. So it saves, resumes and shows itself as pretraining does.
#
# Two programs compute the same probabilities, the engine's, token by token, and training's. Where they differ by more
# than rounding, training learns about answers that it would not have given. `rollouts/off_by` is the largest
# difference in nats of each step: look at it first when a run does not learn.


# %%
def mean_of(values, mask):
    """The mean of values where mask is 1; 0 where it never is."""
    return float(np.sum(np.where(mask > 0, values, 0)) / max(np.sum(mask), 1))


def make_roll(setup, reference, config, model, mesh):
    """Task.roll: (params, {"x": numbers of the answers}) -> ([batch] * updates, figures)."""
    limits, policy, run = setup.limits, setup.policy, setup.run
    roller = setup.roller
    judge, width = make_judge(config, model, mesh), batch_width(config, limits)
    kept, same = reference() if policy.kl else None, SameRewards()

    def roll(params, asked):
        jax.block_until_ready(params)  # the step before is still at work: its seconds are not these
        begun, numbers = time.perf_counter(), np.asarray(asked["x"])
        problems = [setup.problem(int(number) // run.answers) for number in numbers[:: run.answers]]
        seeds = [seed_of(run.seed, "step", int(number)) for number in numbers]
        rollouts = roller.answer(on_this_host(gathered(params)), problems, run.answers, seeds)
        figures = describe_rollouts(rollouts) | {"rollouts/seconds": time.perf_counter() - begun}
        batch = rollout_batch(rollouts, width, roller.tokens.bos, policy)
        chosen, entropy = judge(params, batch)
        same.look(figures)
        figures["rollouts/off_by"] = float(np.max(np.abs(chosen - batch["old"]) * batch["mask"]))
        figures["rollouts/entropy"] = mean_of(entropy, batch["mask"])
        if kept is not None:
            batch["reference"], _ = judge(kept, batch)
            figures["rollouts/kl"] = mean_of(kl_estimate(chosen, batch["reference"]), batch["mask"])
        return [batch] * run.updates, figures

    return roll


def make_score(setup, reference, config, model, mesh):
    """Task.score: pass@1, pass@k, reward on held-out problems, distance to the reference; val_loss: 1 - reward."""
    run = setup.run
    ask, judge = make_asking(setup), make_judge(config, model, mesh)

    def score(params):
        rollouts, figures, _ = ask(params, min(run.asked, WATCHED))
        batch = rollout_batch(rollouts, batch_width(config, setup.limits), 0, setup.policy)
        kl = mean_of(kl_estimate(batch["old"], judge(reference(), batch)[0]), batch["mask"])
        return {"val_loss": 1 - figures["tasks/reward"], **figures, "tasks/kl": kl}

    return score


WATCHED = 64  # held-out problems of an evaluation on the way


def make_asking(setup):
    """A function of (params, count, temperature=the run's) -> (rollouts, figures, standard error of pass@1): the first
    `count` held-out problems, each `tries` times; the same draws whenever it is called."""
    run, roller = setup.run, setup.roller

    def ask(params, count, temperature=None):
        problems = [setup.problem(number, held_out=True) for number in range(count)]
        tries = 1 if temperature == 0 else run.tries
        seeds = [seed_of(run.seed, "asked", number) for number in range(count * tries)]
        rollouts = roller.answer(on_this_host(gathered(params)), problems, tries, seeds, temperature)
        return rollouts, *pass_figures(rollouts, tries)

    return ask


@dataclasses.dataclass(frozen=True)
class Setup:
    """What rollouts need: problem(number, held_out=False) -> Problem; the run's settings with nothing left open. One
    Roller serves training and tests: its programs are compiled once."""

    problem: object
    tokenizer: object
    roller: Roller
    run: RewardRun
    policy: Policy
    limits: AnswerLimits


def numbered_batches(config, position=None):
    """({"x": the numbers of a step's answers}, position after it) without end."""
    start = 0 if position is None else position.get("next")
    require(isinstance(start, int) and start >= 0, "position", position, "is none in a list of problems")
    for first in itertools.count(start, config.total_batch_size):
        after = first + config.total_batch_size
        yield {"x": np.arange(first, after, dtype=np.int32)}, {"next": after}


def learning_by_reward(config, setup, reference, origin=None):
    """The Task; reference() -> the parameters that it began with; origin: JSON that says what else it is made from."""
    run = setup.run
    train.check_vocabulary(config, setup.tokenizer)
    require(host_count() == 1, "hosts", host_count(), "answers are drawn on one host: start it on one")
    require(not config.stages, "stages", config.stages, "a step's batch is what the model writes: leave it out")
    kept = {name: getattr(run, name) for name in KEPT_SETTINGS}
    revision = hashlib.sha256(json.dumps([kept, origin], sort_keys=True).encode()).hexdigest()[:20]
    return Task(
        batches=functools.partial(numbered_batches, config),
        loss=functools.partial(rollout_loss, setup.policy),
        score=functools.partial(make_score, setup, reference),
        origin={
            "data": {"name": "rollouts", "revision": revision},
            "tokenizer_sha256": tok.tokenizer_hash(setup.tokenizer),
        },
        facts={"rollouts": kept, "made_from": origin},
        files={TOKENIZER: setup.tokenizer.to_str(pretty=True).encode()},
        arrays=arrays_of(setup.policy),
        roll=functools.partial(make_roll, setup, reference),
    )


KEPT_SETTINGS = (  # settings that a run has from its first step to its last
    "problems", "algorithm", "answers", "updates", "clip", "kl", "temperature", "top_k", "question_tokens",
    "answer_tokens", "asked", "tries", "seed",
)  # fmt: skip


def arrays_of(policy):
    """The names in a batch."""
    return ("x", "y", "mask", "old", "advantage", "weight", *(["reference"] if policy.kl else []))


# %% [markdown]
# ## Will both fit?
#
# A step has two phases. While answers are written, the training's state waits, and the engine has a copy of the weights
# in the compute type and a cache for each answer. Then that is given back, and the update has its gradients and
# activations. `--preflight v6e:1x1` compiles both for the chip and says the peak of each.


# %%
def compile_rollouts(config, model, limits, places, device):
    """[read, write]: the engine's largest programs for `places` answers, compiled for a device; nothing is run."""
    place, length = jax.sharding.SingleDeviceSharding(device), limits.question_tokens + limits.answer_tokens
    on_chip = functools.partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place))
    decoder, table = Decoder(config, model, train.attention_parts(config), length), model.weights(config)
    cast = functools.partial(cast_weights, table, dtype=config.dtype)
    params = on_chip(jax.eval_shape(cast, weight_shapes(config, table)))
    rings = on_chip(jax.eval_shape(functools.partial(empty_rings, config, places, length)))
    many = max(1, min(places, PROMPT_TOKENS // length))
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    read = jax.jit(decoder.read_prompts, donate_argnums=1)
    read = read.lower(params, rings, ints(many, length), ints(many), ints(many), on_chip(blank_turn(many).knobs))
    write = jax.jit(functools.partial(decoder.write_tokens, span=length), donate_argnums=1)
    return read.compile(), write.lower(params, rings, on_chip(blank_turn(places, WRITTEN_AT_ONCE))).compile()


WRITTEN_AT_ONCE = 8  # tokens of an engine's dispatch


def describe_phases(config, model, optimizer, limits, places, topology):
    """Two lines: the peak of rollouts and of the update on a TPU topology, by its compiler."""
    mesh = train.make_mesh(topology_devices(topology)[:1])
    state = bytes_of(train.state_shapes(config, mesh, model, optimizer))
    device = mesh.devices.flat[0]
    rolling = max(peak_bytes(c, device.platform) for c in compile_rollouts(config, model, limits, places, device))
    short = dataclasses.replace(config, seq_len=batch_width(config, limits))
    loss, arrays = functools.partial(rollout_loss, Policy()), arrays_of(Policy())
    fit = train.preflight(short, topology, model, optimizer=optimizer, loss=loss, batch=arrays)
    say(f"rollouts: {places} answers at once: {(state + rolling) / 2**30:.2f} GiB at the fullest moment, "
        f"{state / 2**30:.2f} of them the training's state")  # fmt: skip
    say(f"update: {config.total_batch_size} x {short.seq_len} tokens: {fit.peak_bytes / 2**30:.2f} GiB at the fullest "
        f"moment; the larger of the two has to fit")  # fmt: skip


# %% [markdown]
# ## Run
#
# The newest chat in `runs/` is taken; without one it says what to run first. Its shape stays; rates are a small share
# of fine-tuning's, rise for five steps and fall to 0. The optimizer begins with empty moments: those of fine-tuning are
# of another loss, whose gradients are far larger.
#
# A rate too high is what breaks a run first. Four times the laptop's took one seed from 28 to 71 %, and another to 0
# within six steps, for good: where no answer is right, nothing is learned any more.
#
# - `--problems "arithmetic sorting"` takes several kinds in turn;
# - `--algorithm grpo --updates 2 --kl 0.01` is the method of DeepSeekMath.


# %%
REWARDED = {
    "stages": "", "packing": "stream", "warmup_steps": 5, "warmup_ratio": 0.0, "warmdown_ratio": 1.0,
    "final_lr_frac": 0.0, "weight_decay": 0.0, "sample_every": 0, "eval_core_every": 0, "save_every": 0,
    "steps_before": 0, "total_batch_size": 256, "num_iterations": 467, "eval_every": 60,
}  # fmt: skip
STEADY_MUON = {"momentum_start": 0.95, "momentum_warmup": 1, "beta1": 0.95, "momentum_end": 0.95}
LAPTOP = {"total_batch_size": 64, "device_batch_size": 32, "num_iterations": 80, "eval_every": 20, "loss_slice": 1024}
SIZES = {"answers": 16, "question_tokens": 384, "answer_tokens": 256, "places": 256}
LAPTOP_SIZES = {"answers": 8, "question_tokens": 48, "answer_tokens": 48, "places": 64}
RATE, LAPTOP_RATE = 0.05, 0.025  # of fine-tuning's
REFERENCE_TOKENS = 2**19  # of a batch at which Muon's rates are what they are called


def rewarded_fields(base, model, optimizer, preset):
    """{field: value} of a run that improves a chat whose Config is `base`, on the device of a preset."""
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)} | REWARDED
    own = model.presets[preset]
    fields |= {name: own[name] for name in ("attn_impl", "dtype", "device_batch_size", "loss_slice") if name in own}
    if optimizer.settings is not None:
        fields |= STEADY_MUON
    if preset == "laptop":
        return fields | LAPTOP | {"learning_rate": LAPTOP_RATE * base.learning_rate}
    if optimizer.settings is not None:  # Muon's rates do not follow the batch here
        tokens = fields["total_batch_size"] * base.seq_len
        return fields | {"learning_rate": RATE * (REFERENCE_TOKENS / tokens) ** 0.5}
    return fields | {"learning_rate": RATE * base.learning_rate}


def find_base(overrides):
    """(ModelFiles or None, Model, Optimizer, its Config) of the chat to improve; None only for --preflight."""
    source = peek("model", overrides) or newest_chat(peek("out", overrides))
    if not source and peek("preflight", overrides):
        model, optimizer = train.model_named("nanochat"), train.optimizer_named("muon")
        fields = train.presets_of(model, optimizer)["chip"]
        return None, model, optimizer, config_with(model.config, optimizer.settings)(**fields)
    if not source:
        raise UserError("model='': there is no chat yet to improve: uv run 07_chat.py first, or name one with --model")
    return train.open_base(source, peek("optimizer", overrides))


def newest_chat(out):
    """The folder of the newest run that was trained on conversations; "" if there is none."""
    return newest_run(out or Run().out, lambda about: (about.get("data") or {}).get("name") == "conversations")


def fill_sizes(run):
    """A RewardRun with nothing left open."""
    sizes = LAPTOP_SIZES if run.preset == "laptop" else SIZES
    sizes = {name: getattr(run, name) or value for name, value in sizes.items()}
    problems = run.problems or PROBLEMS["offline" if run.data == "offline" else "hub"]
    return dataclasses.replace(run, **sizes, problems=problems, data="hub" if "gsm8k" in problems else "offline")


def rewarded_presets(model, optimizer, base):
    """{preset: fields} of a run that improves a chat."""
    known = {field.name for field in dataclasses.fields(config_with(model.config, optimizer.settings))}
    presets = {}
    for preset in model.presets:
        fields = rewarded_fields(base, model, optimizer, preset)
        data = {"data": "offline" if preset == "laptop" else "hub"}
        presets[preset] = {name: value for name, value in fields.items() if name in known} | data
    return presets


def choose_rewarded(files, model, optimizer, base, overrides=""):
    """(RewardRun, config) with nothing left open."""
    config_class, presets = config_with(model.config, optimizer.settings), rewarded_presets(model, optimizer, base)

    def name(run, config):
        kept = fill_sizes(run)
        settings = [{name: getattr(kept, name) for name in KEPT_SETTINGS}, dataclasses.asdict(config)]
        source = Path(files.source).name if files else "none"
        return f"rl-{source}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]}"

    run, config = choose(config_class, presets, overrides, RewardRun, name)
    run = fill_sizes(run)
    check_sizes(run, config)
    return run, config


def check_sizes(run, config):
    """UserError unless groups fill a batch and the algorithm can take so many updates."""
    rows = config.total_batch_size
    require(rows % run.answers == 0, "answers", run.answers, f"must divide total_batch_size={rows}: answers of a step")
    require(run.answers > 1, "answers", run.answers, "one answer has nothing to be compared with: at least 2")
    once = run.updates == 1 or run.algorithm != "reinforce"
    require(once, "updates", run.updates, "reinforce has no ratio that holds a second update back: use grpo or dr-grpo")
    known = run.kl == 0 or run.temperature == 1
    require(known, "kl", run.kl, "its estimate is of answers drawn at temperature 1")


def limits_of(run):
    """The AnswerLimits of a RewardRun."""
    return AnswerLimits(run.question_tokens, run.answer_tokens, run.temperature, run.top_k)


def make_setup(run, config, model, mesh, tokenizer):
    """(Setup of a RewardRun, commits of what was downloaded)."""
    problem, commits = open_problems(run.problems.split())
    policy = Policy(run.algorithm, run.clip, run.kl, run.answer_tokens)
    roller = make_roller(config, model, mesh, tokenizer, limits_of(run), run.places)
    return Setup(problem, tokenizer, roller, run, policy, limits_of(run)), commits


# %% [markdown]
# 03 sweeps it with `--task rl`: every trial begins with the same chat and is given the same problems, and only the rate
# and the end of its schedule differ.

# %%
SHORT_REWARDED = {"chip": {"num_iterations": 60}, "gpu": {"num_iterations": 60}, "laptop": {"num_iterations": 20}}


class RewardMaterial(NamedTuple):
    """What the trials of a sweep begin with and are asked; name and revision: those of the problems."""

    name: str
    revision: str
    chat: tuple  # (ModelFiles, Model, Optimizer)
    tokenizer: object
    run: RewardRun
    origin: dict


def choose_rewarding(asked):
    """The SweepChoice of improving the chat that asked["base"] names, or the newest one."""
    for name in ("mixture", "conversations"):
        require(not asked[name], name, asked[name], "belongs to --task chat")
    source = asked["base"] or newest_chat(asked["out"])
    require(source, "base", "", "there is no chat yet to improve: uv run 07_chat.py first, or name one with --base")
    files, model, optimizer, base = train.open_base(source, asked["optimizer"])
    named = train.names_for_sweep(source, model, optimizer, asked["model"])
    presets = rewarded_presets(model, optimizer, base)
    presets = {name: presets[name] | short for name, short in SHORT_REWARDED.items() if name in presets}
    rates = {name: fields["learning_rate"] for name, fields in presets.items()}
    spread = {name: {"distribution": "log_uniform_values", "min": r / 8, "max": r * 4} for name, r in rates.items()}
    hashes = list(map(hash_file, array_files(files.weights)))

    def open_material(data, num_shards, kept):
        run = fill_sizes(RewardRun(data=data, preset="laptop" if data == "offline" else "chip"))
        _, commits = open_problems(run.problems.split())
        revision = hashlib.sha256(json.dumps([run.problems, commits]).encode()).hexdigest()[:12]
        origin = {"commits": commits, "base": hashes}
        tokenizer = tok.load_tokenizer(files.tokenizer)
        return RewardMaterial("rollouts", revision, (files, model, optimizer), tokenizer, run, origin)

    return SweepChoice(
        *named,
        presets,
        {name: {"learning_rate": spread[name], "final_lr_frac": {"min": 0.0, "max": 0.3}} for name in presets},
        open_material,
        facts={"task": "rl", "base": source, "base_sha256": " ".join(hashes)},
    )


def prepare_rewarding(config, material):
    """What `train` is handed of a trial: the Task, and the chat that it begins with."""
    files, model, optimizer = material.chat
    check_sizes(material.run, config)
    setup, _ = make_setup(material.run, config, model, train.make_mesh(), material.tokenizer)
    reference = functools.partial(files.load_params, config, model)
    start = functools.partial(load_start, files, config, model, optimizer, moments=False)
    return {"task": learning_by_reward(config, setup, reference, material.origin), "start": start}


def rewarding_command(known):
    """The command that improves the chat at length, for the constants of a sweep."""
    return f"uv run 08_rl.py --model {known['base']}"


REWARDING = SweepTask(
    "08_rl.REWARDING", choose_rewarding, prepare_rewarding, rewarding_command, arrays=arrays_of(Policy())
)

# %%
OVERRIDES = ""  # @param ["", "--problems sorting", "--algorithm dr-grpo"] {allow-input: true}

if __name__ == "__main__":
    prepare()
    train.export_if_asked(OVERRIDES)
    files, model, optimizer, base = find_base(OVERRIDES)
    run, config = choose_rewarded(files, model, optimizer, base, OVERRIDES)
    limits = limits_of(run)
    short = dataclasses.replace(config, seq_len=batch_width(config, limits))  # a batch's rows, not the context
    questions = config.total_batch_size // run.answers
    say(f"chat: {files.source if files else 'none, one for a chip is assumed'}; problems: {run.problems}")
    say(f"a step: {questions} questions x {run.answers} answers, by {run.algorithm}")
    if run.preflight not in ("", "here"):
        describe_phases(config, model, optimizer, limits, run.places, run.preflight)
    parts = {"loss": functools.partial(rollout_loss, Policy(run.algorithm)), "batch": arrays_of(Policy())}
    run = train.show_fit(short, run, model, optimizer=optimizer, **parts)
    tokenizer = tok.load_tokenizer(files.tokenizer)
    setup, commits = make_setup(run, config, model, train.make_mesh(shape=run.mesh), tokenizer)

# %% [markdown]
# What can it do before? The same held-out problems are asked before and after, at the same temperature, with the same
# limits. Next to it stands the likeliest answer's accuracy: drawing costs some, and part of what is won is that back.


# %%
def describe_passes(when, figures, error, greedy):
    """A line of figures on held-out problems."""
    passes = ", ".join(f"{n.removeprefix('tasks/')} {v:.3f}" for n, v in figures.items() if "pass@" in n)
    reward = figures["tasks/reward"]
    return f"{when}: {passes}, +- {error:.3f} of pass@1; likeliest answer {greedy:.3f}; reward {reward:.3f}"


def ask_held_out(ask, params, run, when):
    """Asks all held-out problems, and prints what was right."""
    _, figures, error = ask(params, run.asked)
    greedy = ask(params, run.asked, 0)[1]["tasks/pass@1"]
    say(describe_passes(when, figures, error, greedy))
    return figures


def make_good_and_bad(setup, ask, each=3):
    """A function of params -> [(question and reward, answer)]: held-out answers of the highest and lowest rewards."""

    def show(params):
        rollouts, _, _ = ask(params, 24)
        sure = sorted({r.group: r for r in rollouts}.values(), key=lambda r: -r.reward)  # one answer to a question
        shown = {"text": "{}", "python": "[{}", "python_output": " -> {}] "}
        spell = lambda r: "".join(shown[part["type"]].format(part["text"]) for part in r.parts)
        question = lambda r: setup.problem(r.group, held_out=True).prompt
        return [(f"{question(r)} (reward {r.reward:.2f})", spell(r)) for r in [*sure[:each], *sure[-each:]]]

    return show


if __name__ == "__main__":
    ask = make_asking(setup)
    ask_held_out(ask, files.load_params(config, model), run, "before")

# %%
if __name__ == "__main__":
    hub_token = read_secret("HF_TOKEN")
    reference = functools.partial(files.load_params, config, model)

    def prepare_rewarded(run, config, folder, model):
        """(tokenizer, what `train` is handed besides), as train_run asks for it."""
        origin = {"commits": commits, "base": list(map(hash_file, array_files(files.weights)))}
        return tokenizer, {
            "task": learning_by_reward(config, setup, reference, origin),
            "start": functools.partial(load_start, files, config, model, optimizer, moments=False),
            "sample": make_good_and_bad(setup, ask),
            "draw": plot_rewards,
            "traced": 1,  # on a CPU the trace of a rollout takes twenty times as long as the rollout
        }

    result, tokenizer, mirror = train.train_run(run, config, hub_token, model, optimizer, prepare_rewarded)

# %% [markdown]
# ## Look
#
# The same problems again, then three good and three bad answers. Look at the bad ones: what pays without being right
# shows there first.

# %%
if __name__ == "__main__":
    reached = ask_held_out(ask, result.params, run, "after")
    for question, text in result.samples:
        say(f"user: {question}\nmodel: {text}")

# %% [markdown]
# ## Save
#
# As 07 saves. `uv run 07_chat.py --talk --model runs/NAME` talks to it.

# %%
REWARDED_LOADING = """
import importlib
train = importlib.import_module("02_train")  # in a clone of {repository}
config, params, tokenizer, model = train.open_model({source!r})
# It is talked to with: uv run 07_chat.py --talk --model {source}
# and was asked things such as: {prompt!r}
"""
REWARDED_PURPOSE = """a chat of onechip, improved by reinforcement learning on problems whose answers a rule checks.
What it writes may be wrong or offensive."""

if __name__ == "__main__" and is_first():
    result = result._replace(val_loss=None)  # it is 1 - reward: neither a line nor the card may call it nats a token
    say(describe_result(result._replace(samples=[]), config))
    share = (
        f"Of {run.asked} held-out problems ({run.problems}), {reached['tasks/pass@1']:.1%} are right at the first try."
    )
    folder = train.export_model(
        result,
        tokenizer,
        mirror.repo if mirror else "",
        chat=True,
        loading=REWARDED_LOADING,
        purpose=f"{REWARDED_PURPOSE} {share}",
    )
    upload_folder(folder, names_of_files(folder), hub_token, run.hub_repo, f"onechip-{run.name}")
