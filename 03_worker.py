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
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onechip/onechip/blob/main/notebooks/03_worker.ipynb)
# # 03: sweep on one machine, or on several Colabs
#
# A sweep tries settings of 02's trainer, learns from each trial which one to try next, and stops hopeless ones early.
#
# - **To sweep a changed model**, push your change to a branch and set `REF` in the cell below to it. Every worker then
#   runs that commit; one with another commit says so and stops.
# - **What it costs** in chip hours is printed before the first trial: the estimated time of a step, times the steps of
#   a trial, times the number of trials. The compiler estimates 0.51 s for a step of 131,072 tokens, so 30 trials of
#   1,000 steps take 4.3 hours of one v6e, less what is stopped early.
# - **To stop a worker**, use the stop button or Ctrl-C: its trial is saved and handed out again. To stop the whole
#   sweep, use its page in wandb, or start no more workers.
#
# | where | needs | trials | time | cost |
# |---|---|---|---|---|
# | laptop, two cores | no account, no network | 6 of 0.1M tokens | a minute of CPU time each | nothing |
# | Colabs, TPU v6e | a wandb account, or a folder | 30 of 131M tokens | 9 minutes each, estimated | compute units |

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
# ## What a sweep does
#
# It tries several settings, spends little on each, and continues only with the better ones. Below, eight learning rates
# are tried on a toy: gradient descent on a bowl with steep and flat directions. After 2, 4 and 8 steps the worse half
# is stopped, so most of the work goes to the good ones. Hyperband, which stops trials further down, works like this.

# %%
import numpy as np

from onechip.machine import prepare, wants_a_look

LOOK = __name__ == "__main__" and wants_a_look()  # the small checks are for a reader: a script with flags skips them


def halve_toy(rates=(0.003, 0.01, 0.03, 0.1, 0.15, 0.18, 0.21, 0.3)):
    """Tries learning rates on a quadratic, and three times prints the best and stops the worse half."""
    curvatures = np.array([10.0, 3.0, 1.0])
    trials = {rate: np.ones(3) for rate in rates}
    for steps in (2, 2, 4):
        for rate in trials:
            for _ in range(steps):
                trials[rate] = trials[rate] - rate * curvatures * trials[rate]
        losses = {rate: curvatures @ weights**2 / 2 for rate, weights in trials.items()}
        best, *ranked = sorted(losses, key=losses.get)
        stopped = ranked[len(losses) // 2 - 1 :]
        print(f"{len(losses)} trials, {steps} steps more: best is {best}, loss {losses[best]:.2g}; stopped: {stopped}")
        trials = {rate: trials[rate] for rate in trials if rate not in stopped}


if LOOK:
    prepare()
    halve_toy()

# %% [markdown]
# ## Setup
#
# The trainer is 02's, imported, so a sweep's winner is what 02 trains. Two more packages are imported where they are
# used: `wandb`, and `sweeps`, which holds wandb's search algorithms as plain functions. Without an account only
# `sweeps` is needed.

# %%
import _thread
import contextlib
import csv
import dataclasses
import difflib
import functools
import gc
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from onechip.doors import SweepChoice, SweepTask, config_with
from onechip.errors import UserError, first_line, report_in_one_line, require, say, show_value
from onechip.export import find_part
from onechip.files import (
    age_of,
    atomic_write,
    cannot_write,
    clear_abandoned,
    create_whole,
    read_json_lines,
    read_json_or_none,
    require_writable,
    write_json,
    write_text,
)
from onechip.fit import DoesNotFit
from onechip.machine import deferred_interrupt, git_commit, read_secret
from onechip.perchip import run_on_each_chip
from onechip.plots import show_picture
from onechip.runfolder import RunFolder
from onechip.settings import (
    BELOW,
    Run,
    check_fields,
    fixed_fields,
    is_below,
    parse_settings,
    peek,
    setting,
    settle,
    words_of,
)
from onechip.stages import count_tokens
from onechip.tables import table

train = importlib.import_module("02_train")
tok = importlib.import_module("01_tokenizer")


# What --task can name.
SWEPT = {"pretraining": "03_worker.PRETRAINING", "chat": "07_chat.TUNING", "rl": "08_rl.REWARDING"}
TASKS = "tasks/"  # names of figures begin with it where higher is better


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What this worker does and, if it creates the sweep, what the sweep is."""

    task: str = setting("pretraining", "what a trial does: pretraining; chat, 07's; or rl, 08's", choices=tuple(SWEPT))
    base: str = setting("", "--task chat, rl: a run's folder, an export or a Hub repository; empty: the newest")
    mixture: str = setting("", "--task chat: sources and how many of each, as 07 has it; empty: by the data")
    conversations: str = setting("", "--task chat: a JSONL file of your own; every worker needs the same one")
    model: str = setting("gpt", "what is trained: 02's model, 04's or 05's", choices=tuple(train.MODELS))
    where: str = setting("", "wandb or local; empty: wandb if there is a key and the preset is not laptop")
    sweep: str = setting("", "id of a wandb sweep to join, [entity/project/]id; empty: the one of these settings")
    count: int = setting(0, "trials that this worker runs; 0: until the sweep is over", at_least=0)
    chips: str = setting("all", "a trial's chips: all of this host, or one, with a worker each", choices=("all", "one"))
    run_cap: int = setting(0, "trials of the whole sweep; 0: 6 for the laptop preset, else 30", at_least=0)
    budget: str = setting("tokens", "what every trial gets the same amount of", choices=("tokens", "flops"))
    evaluations: int = setting(
        5, "evaluations in a trial, evenly spaced: the points at which it can be stopped early", at_least=1
    )
    method: str = setting("bayes", "how the next trial is chosen", choices=("bayes", "random", "grid"))
    metric: str = setting(
        "",
        "what is made best: val_bpb, val_loss or a figure of tasks in metrics.jsonl: tasks/core_subset, tasks/chat, "
        "tasks/made; empty: val_bpb, and for chat val_loss, a supervised token",
    )
    project: str = setting("onechip", "wandb project")
    any_version: bool = setting(False, "run even if commit or data differ from those of the sweep")
    give_up: int = setting(12, "failed trials in a row that end a worker; 0: never", at_least=0)
    lease: float = setting(
        60.0, "local: seconds without a sign of life after which a trial is handed out again", above=0
    )

    def __post_init__(self):
        check_fields(self)
        require(self.where in ("", "wandb", "local"), "where", self.where, "use wandb or local")
        known = self.metric in ("", "val_bpb", "val_loss") or self.metric.startswith(TASKS)
        require(known, "metric", self.metric, f"use val_bpb, or a figure that begins with {TASKS}, or val_loss")


# %% [markdown]
# ## What is swept
#
# A sweep is one dictionary in wandb's format, whether wandb or a folder hands out the trials.
#
# - `SPACE` names the `Config` fields to sweep. All other fields are in the dictionary as constants, and so are commit
#   and data: to join, a worker needs nothing but the sweep.
# - What follows from another field is not swept: `n_head` sets width and depth.
# - A misspelt name, a bound that `Config` refuses, or two values that do not go together are reported when the sweep is
#   created, not by its 17th trial.

# %%
SPACE = {
    "learning_rate": {"distribution": "log_uniform_values", "min": 5e-5, "max": 3e-3},
    "weight_decay": {"min": 0.0, "max": 0.3},
    "warmup_ratio": {"min": 0.0, "max": 0.1},
    "warmdown_ratio": {"min": 0.2, "max": 0.8},
    "n_head": {"values": [6, 8, 10]},
    "device_batch_size": {"values": [2, 4, 8]},
}
SPACES = {
    "chip": SPACE,
    "gpu": SPACE | {"device_batch_size": {"values": [8, 16, 32]}},
    "laptop": SPACE
    | {
        "learning_rate": {"distribution": "log_uniform_values", "min": 5e-4, "max": 2e-2},  # a model of 1/37 the size
        "n_head": {"values": [2, 3, 4]},
        "device_batch_size": {"values": [4, 8]},
    },
}
MUON_RATES = {  # Muon scales them by batch and width
    "matrix_lr": {"distribution": "log_uniform_values", "min": 0.005, "max": 0.08},
    "embed_lr": {"distribution": "log_uniform_values", "min": 0.1, "max": 1.0},
    "lm_head_lr": {"distribution": "log_uniform_values", "min": 0.002, "max": 0.03},
    "weight_decay": {"min": 0.0, "max": 0.6},
    "warmdown_ratio": {"min": 0.4, "max": 0.9},
}
DEPTHS = {"chip": [10, 12, 14], "gpu": [10, 12, 14], "laptop": [2, 3, 4]}  # of 05's model


def space_of(model, optimizer, preset):
    """What is swept where nobody says otherwise, for names as --model and --optimizer take them."""
    space = SPACES[preset]
    sizes = {"gpt": {"n_head": space["n_head"]}, "swiglu": {}, "nanochat": {"depth": {"values": DEPTHS[preset]}}}
    rates = MUON_RATES if optimizer == "muon" else {name: spec for name, spec in space.items() if name != "n_head"}
    return rates | sizes[model] | {"device_batch_size": space["device_batch_size"]}


OPTIMIZER_OF = {"gpt": "adamw", "swiglu": "adamw", "nanochat": "muon"}  # where --optimizer says nothing
# A trial is a short run: it shows which setting learns faster, not how good a long run gets.
SHORT = {
    "chip": {"num_iterations": 1000},
    "gpu": {"num_iterations": 1000},
    "laptop": {"num_iterations": 60, "eval_tokens": 1 << 14},
}


def metric_of(sweep):
    """The name of the figure that a sweep makes best."""
    return sweep["metric"]["name"]


def cost_of(value, sweep):
    """A value of that figure as a number that is to be low; infinite for None."""
    if value is None:
        return math.inf
    return -value if sweep["metric"]["goal"] == "maximize" else value


def trial_presets(model, optimizer):
    """{preset: fields} of a short run."""
    presets = train.presets_of(model, optimizer)
    return {name: presets[name] | short for name, short in SHORT.items()}


ORIGIN = ("commit", "data", "data_name", "data_revision", "num_shards", "budget", "budget_size", "evaluations")
ORIGIN += ("model", "optimizer")  # these two as --model and --optimizer name them
DERIVED = ("num_iterations", "eval_every", "sample_every", "save_every", "keep")  # follow from budget and evaluations


def make_sweep(settings, run, config, space, corpus, facts=None):
    """The sweep as a dictionary in wandb's format: `space` is swept, the other fields of `config` are constants.

    facts: more constants, of another task than pretraining.
    """
    fixed = {k: v for k, v in as_given(config).items() if k not in DERIVED}
    optimizer, tokens = run.optimizer or OPTIMIZER_OF[settings.model], count_tokens(config)
    model = train.model_named(settings.model)
    size = tokens if settings.budget == "tokens" else tokens * train.flops_per_token(config, model)
    data = run.data if facts or run.data in ("offline", *tok.DATASETS) else ""  # a folder's path is each worker's own
    origin = (git_commit() or "", data, corpus.name, corpus.revision, run.num_shards)
    origin += (settings.budget, size, settings.evaluations, settings.model, optimizer)
    values, goal = fixed | dict(zip(ORIGIN, origin, strict=True)) | (facts or {}), "minimize"
    if settings.metric.startswith(TASKS):
        values["eval_core_every"], goal = max(1, config.eval_core_every), "maximize"
    sweep = {
        "method": settings.method,
        "metric": {"name": settings.metric or task_of(values).metric, "goal": goal},
        "early_terminate": {"type": "hyperband", "min_iter": max(1, settings.evaluations // 4), "eta": 2},
        "run_cap": settings.run_cap or (6 if run.preset == "laptop" else 30),
        "parameters": {**{name: {"value": value} for name, value in values.items()}, **space},
    }
    digest = hashlib.sha256(json.dumps(sweep, sort_keys=True).encode()).hexdigest()[:6]
    return {"name": run.name or f"sweep-{run.preset}-{corpus.name}-{digest}", **sweep}


def task_of(parameters):
    """The SweepTask of a sweep's constants or a trial's parameters; UserError if there is none of that name."""
    name = parameters.get("task", "pretraining")  # older sweeps do not say
    require(name in SWEPT, "task", name, f"use {' or '.join(SWEPT)}")
    if SWEPT[name] == PRETRAINING.name:
        return PRETRAINING
    return find_part("task", SWEPT[name], Path(tok.__file__).parent, SweepTask)


def check_kept(parameters, names):
    """UserError if one of these fields would change the model that another task than pretraining begins with."""
    if task_of(parameters) is PRETRAINING:
        return
    kept = set(fixed_fields(config_class_of(parameters))) - {"total_batch_size"}
    for name in names:
        require(name not in kept, "field", name, "stays as the base has it: leave it out")


def choose_pretraining(asked):
    """The SweepChoice of training a new model."""
    model = asked["model"] or "gpt"
    require(model in OPTIMIZER_OF, "model", model, f"use one of {', '.join(OPTIMIZER_OF)}")
    for name in ("base", "mixture", "conversations"):
        require(not asked[name], name, asked[name], "belongs to --task chat")
    optimizer = asked["optimizer"] or OPTIMIZER_OF[model]
    presets = trial_presets(train.model_named(model), train.optimizer_named(optimizer))
    spaces = {preset: space_of(model, optimizer, preset) for preset in presets}
    return SweepChoice(model, optimizer, presets, spaces, tok.get_corpus)


def prepare_pretraining_trial(config, corpus):
    """What `train` is handed of a trial."""
    return {"task": train.pretraining(config, corpus, tok.get_tokenizer(corpus, config.vocab_size))}


def pretraining_command(known):
    """The command that trains at length, for the constants of a sweep."""
    return f"uv run {train.MODELS[known['model']].partition('.')[0]}.py"


PRETRAINING = SweepTask(
    SWEPT["pretraining"], choose_pretraining, prepare_pretraining_trial, pretraining_command, metric="val_bpb"
)


def as_given(config):
    """{field: value}, with 0 for what follows from other fields, so that those can be swept: n_kv_head from n_head."""
    values = dataclasses.asdict(config)
    zeros = {field.name for field in dataclasses.fields(config) if field.default == 0 and values[field.name]}
    follows = {name for name in zeros - set(DERIVED) if dataclasses.replace(config, **{name: 0}) == config}
    return {name: 0 if name in follows else value for name, value in values.items()}


def swept_fields(sweep):
    """{name: its range or values} of the swept parameters, without the constants."""
    known = constants(sweep)
    return {name: spec for name, spec in sweep["parameters"].items() if name not in known}


def constants(sweep):
    """{name: value} of the constants of a sweep."""
    parameters = sweep["parameters"].items()
    return {name: spec["value"] for name, spec in parameters if isinstance(spec, dict) and "value" in spec}


# %%
DISTRIBUTIONS = {  # wandb's names of those with bounds or values: the keys that they take
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "uniform": ("min", "max"),
    "int_uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "inv_log_uniform_values": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    "q_log_uniform_values": ("min", "max", "q"),
}


def check_keys(name, spec):
    """UserError unless a swept parameter is a dict with a distribution of that list and with its keys only."""
    require(isinstance(spec, dict) and spec, name, spec, 'give {"values": [...]} or {"min": ..., "max": ...}')
    values = "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    kind = spec.get("distribution", values if "values" in spec else "uniform")
    near = difflib.get_close_matches(str(kind), DISTRIBUTIONS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(DISTRIBUTIONS)}"
    require(kind in list(DISTRIBUTIONS), f"{name}: distribution", kind, hint)
    unknown = [key for key in spec if key not in ("distribution", *DISTRIBUTIONS[kind])]
    require(not unknown, name, spec, f"{kind} takes {', '.join(DISTRIBUTIONS[kind])} and not {', '.join(unknown)}")
    q = spec.get("q", 1)
    require(is_number(q) and q > 0, name, spec, "q, the width of a step, must be greater than 0")


def is_number(value):
    """Whether a value is a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def extremes(name, spec):
    """The values, or the two bounds, of a swept parameter; UserError if it has neither."""
    check_keys(name, spec)
    if "values" in spec:
        values, shares = spec["values"], spec.get("probabilities")
        require(isinstance(values, list | tuple) and values, name, spec, "values must be a list with at least one")
        listed = shares is None or (isinstance(shares, list | tuple) and len(shares) == len(values))
        right = listed and (shares is None or (all(map(is_number, shares)) and min(shares) >= 0))
        right = right and (shares is None or math.isclose(sum(shares), 1, abs_tol=1e-6))
        require(right, name, spec, "probabilities must be one for each value, none negative, with the sum 1")
        return list(values)
    bounds = [spec.get("min"), spec.get("max")]
    ordered = all(map(is_number, bounds)) and bounds[0] < bounds[1]
    require(ordered, name, spec, "give values, or min and max with min < max")
    log = "log" in spec.get("distribution", "")
    require(not log or bounds[0] > 0, name, spec, "a logarithmic distribution needs min > 0")
    return bounds


def check_origin(sweep, place, *more):
    """UserError unless a sweep's dictionary has what this notebook writes into one, the keys `more` too."""
    parameters = sweep.get("parameters")
    known = constants(sweep) if isinstance(parameters, dict) else {}
    missing = [key for key in ("method", "metric", "parameters", *more) if key not in sweep]
    missing += [name for name in ORIGIN if name not in known]
    require(not missing, "sweep", place, f"was not created by this notebook: it lacks {', '.join(missing)}")
    cap = sweep.get("run_cap", 1)
    whole = isinstance(cap, int) and cap > 0
    require(whole, "sweep", place, f"was not created by this notebook: its run_cap is {show_value(cap)}")


def check_sweep(sweep):
    """The Config of every combination of extremes, at most 4096; UserError for the first that cannot be built."""
    fields = [field.name for field in dataclasses.fields(config_class_of(constants(sweep)))]
    space = swept_fields(sweep)
    require(space, "space", space, "name at least one Config field to sweep")
    for name in space:
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(fields)}"
        require(name in fields, "swept parameter", name, f"is no field of Config; {hint}")
        require(name not in DERIVED, "swept parameter", name, "follows from the budget and is not swept")
    check_kept(constants(sweep), space)
    choices = itertools.product(*(extremes(name, spec) for name, spec in space.items()))
    combinations = [dict(zip(space, choice, strict=True)) for choice in itertools.islice(choices, 4096)]
    return [trial_config(constants(sweep) | combination) for combination in combinations]


if LOOK:
    count = math.prod(len(extremes(name, spec)) for name, spec in SPACES["laptop"].items())
    print(f"the laptop's space: {', '.join(SPACES['laptop'])}; {count} combinations of extremes are checked")
    try:
        extremes("learning_rate", {"min": 1e-2, "max": 1e-3})
    except UserError as error:
        print(f"refused: {error}")

# %% [markdown]
# ## Comparable trials
#
# - **Equal cost**: trials of one sweep get the same number of tokens, or with `--budget flops` the same number of
#   FLOPs. Then a smaller model sees more tokens, which is what a choice of size is really about.
# - **Equal score**: all are evaluated on the same held-out tokens.
# - **Equal moments**: after the same shares of their run, five by default, whatever the number of steps. The score is
#   reported there and nowhere else, because Hyperband counts reports: the second report of one trial must mean what the
#   second of another does.


# %%
def trial_config(parameters):
    """The Config of a trial: its steps follow from the budget, rounded so that the evaluations are evenly spaced."""
    config_class, model = config_class_of(parameters), train.model_named(parameters["model"])
    kinds = {field.name: field.type for field in dataclasses.fields(config_class) if field.name not in DERIVED}
    values = {name: plain_value(parameters[name], kind) for name, kind in kinds.items()}
    count = int(parameters["evaluations"])
    require(count > 0, "evaluations", count, "must be a positive integer")
    require(parameters["budget"] in ("tokens", "flops"), "budget", parameters["budget"], "use tokens or flops")
    config = config_class(**values, num_iterations=count)
    per_token = train.flops_per_token(config, model) if parameters["budget"] == "flops" else 1
    step = config.total_batch_size * config.seq_len * per_token
    every = max(1, round(parameters["budget_size"] / step / count))
    derived = {"num_iterations": every * count, "eval_every": every, "sample_every": 0, "save_every": 0, "keep": 1}
    derived["eval_core_every"] = every if config.eval_core_every else 0
    return dataclasses.replace(config, **derived)


def config_class_of(parameters):
    """The Config class of a sweep's model with its optimizer."""
    return config_of_names(parameters["model"], parameters["optimizer"])


def config_of_names(model, optimizer):
    """The Config class of a model with an optimizer, as --model and --optimizer name them."""
    return config_with(train.model_named(model).config, train.optimizer_named(optimizer).settings)


def plain_value(value, kind):
    """A parameter as a Config field takes it: no NumPy scalar, and no 0 where 0.0 is meant."""
    value = value.item() if isinstance(value, np.generic) else value
    return float(value) if kind is float and isinstance(value, int) and not isinstance(value, bool) else value


if LOOK:
    given = train.PRESETS["laptop"] | {"budget": "flops", "budget_size": 1e13, "evaluations": 5}
    given = dataclasses.asdict(train.Config(**train.PRESETS["laptop"])) | {"model": "gpt", "optimizer": "adamw"} | given
    lengths = {heads: trial_config(given | {"n_head": heads, "n_kv_head": 0}).num_iterations for heads in (2, 3, 4)}
    print("steps of equal FLOPs:", ", ".join(f"{steps} with {heads} heads" for heads, steps in lengths.items()))

# %% [markdown]
# ## One trial
#
# A configuration may not compile, not fit, or diverge halfway. That must cost its own time and nothing else.
#
# - Each trial runs in a thread of its own, and an error leaves that thread as text. A traceback would keep every frame
#   of the failed trial alive, with parameters and moments, and later trials would run out of memory.
# - The other thread only waits. Whatever ends a trial early, Ctrl-C or the exception that wandb's agent throws into its
#   thread, interrupts this wait and never the middle of a step. The trial then ends at its next line of metrics.


# %%
class TrialEnd(NamedTuple):
    """How a trial ended, and why: finished, stopped (early), failed, interrupted (to be handed out again) or lost."""

    state: str
    reason: str = ""


class EndTrial(Exception):
    """Ends a trial from inside its listener."""


class Request:
    """A request to end a trial, by whichever thread asks first; `outcome` is None until there is one.

    `began`: whether the trial's folder was opened for training, so that what is in it is this worker's.
    """

    def __init__(self):
        self.outcome, self.began, self._delivered = None, False, False

    def ask(self, state, reason):
        """Asks the trial to end with this TrialEnd, unless it was asked before."""
        self.outcome = self.outcome or TrialEnd(state, reason)

    def obey(self):
        """Raises, once, what makes train() end: KeyboardInterrupt if it is to save first."""
        if self.outcome and not self._delivered:
            self._delivered = True
            raise KeyboardInterrupt if self.outcome.state == "interrupted" else EndTrial


def ignore(_):
    """The listener that does nothing."""


class Job(NamedTuple):
    """A trial to run: its name, parameters, folder, the request to end it, and who listens."""

    name: str
    parameters: dict
    run_dir: Path
    request: Request
    on_start: Callable = ignore  # gets the Config, once it is known that it fits
    on_evaluation: Callable = ignore  # gets all evaluations so far, as rows of metrics.jsonl
    is_lost: Callable = lambda: False  # whether another worker has taken the trial over
    metric: str = "val_bpb"  # the figure that the sweep makes best


def read_evaluations(run_dir, metric="val_bpb"):
    """The evaluations that have a figure, those from before an interruption included: all scores of a step in one."""
    path, scores = RunFolder(run_dir).metrics, {}
    for row in read_json_lines(path, growing=True) if path.exists() else []:
        if "loss" not in row:
            scores[row["step"]] = scores.get(row["step"], {}) | row
    return [row for row in scores.values() if metric in row]


def attempt(job, corpus):
    """Trains a Job's model; returns its TrialEnd, or raises what went wrong."""
    config = trial_config(job.parameters)
    subject = task_of(job.parameters)
    model, optimizer = (train.model_named(job.parameters["model"]), train.optimizer_named(job.parameters["optimizer"]))
    # DoesNotFit comes before anything is on the device
    train.preflight(config, model=model, optimizer=optimizer, batch=subject.arrays)
    job.on_start(config)
    parts = subject.prepare(config, corpus)
    task = parts["task"]

    def batches(position):
        job.request.began = True
        return task.batches(position)

    def listen(row):
        if row["step"] < config.num_iterations:  # a complete trial is not ended early
            if job.metric in row:
                job.on_evaluation(read_evaluations(job.run_dir, job.metric))
            job.request.obey()

    # "owner": who has a trial is decided before, by its lease or by wandb, and not by the lock of its run.
    options = {"accept": ("owner",), "on_log": listen, "notes": {"trial": job.name}}
    options |= {"model": model, "optimizer": optimizer}
    options |= parts | {"task": task._replace(batches=batches)}
    result = train.train(config, run_dir=job.run_dir, **options)
    job.on_evaluation(read_evaluations(job.run_dir, job.metric))
    return TrialEnd("finished") if result.step == config.num_iterations else job.request.outcome


# %%
def clear_traceback(error):
    """Empties the frames of an exception and of its causes: they hold the arrays of the failed trial."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def contain(work, request):
    """work()'s TrialEnd, or one that says in words what it raised; no frame and no array of it is left."""
    try:
        return work()
    except EndTrial:
        return request.outcome
    except BaseException as error:
        clear_traceback(error)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return TrialEnd("failed", kind + first_line(error))


class TrialThread(threading.Thread):
    """Runs a Job; `outcome` is None until it has ended."""

    def __init__(self, job, corpus):
        super().__init__(name="trial")
        self.outcome, self._job, self._corpus = None, job, corpus

    def run(self):
        self.outcome = contain(functools.partial(attempt, self._job, self._corpus), self._job.request)


def run_trial(job, corpus, interrupt=None):
    """Runs a Job in a thread of its own, waits, and returns its TrialEnd; the device is as empty as before.

    An exception thrown into the waiting thread ends the trial as stopped, a noted `interrupt` as interrupted. A trial
    that is over needs no checkpoints; those of one that was lost, or that never began here, are another worker's.
    """
    thread = TrialThread(job, corpus)
    thread.start()
    while thread.outcome is None:
        thrown = False
        try:
            time.sleep(0.1)  # no lock: an exception that is thrown in here must not leave one taken
        except Exception:
            thrown = True
        if interrupt and interrupt.requested:  # first: wandb's agent passes an interrupt on as such an exception
            job.request.ask("interrupted", "the worker was stopped")
        elif thrown:
            job.request.ask("stopped", "by the sweep")
    thread.join()
    gc.collect()
    jax.clear_caches()  # programs take room on the device too; the cache on disk keeps them
    if job.is_lost():
        return TrialEnd("lost", TAKEN_OVER)
    if job.request.began and thread.outcome.state in ("finished", "stopped", "failed"):
        shutil.rmtree(RunFolder(job.run_dir).checkpoints, ignore_errors=True)  # 3 GB each for the default model
    return thread.outcome


TAKEN_OVER = "another worker has taken it over"

if LOOK:
    print(contain(lambda: 1 / 0, Request()))

# %% [markdown]
# ## Without an account
#
# A folder holds the sweep, one file per trial, and the results so far. Workers on one machine, or on a shared folder,
# need no server and no locks. They need two operations that file systems do atomically: a file is created by one worker
# and no other, and a file is renamed over an old one.
#
# - A trial belongs to the worker that created its newest lease, and renews the lease's time stamp every ten seconds.
# - When the time stamp is a minute old and stays, another worker may create the next lease, and the trial resumes from
#   its checkpoint there. No two clocks need to agree.
# - What to try next, and what to stop, is decided by `sweeps`, the code that wandb's servers run.


# %%
def load_search():
    """The `sweeps` library; UserError if it is not installed."""
    try:
        with warnings.catch_warnings(action="ignore"):  # pydantic's, on every import
            import sweeps

            return sweeps
    except ImportError as error:
        raise UserError(
            f"sweeps cannot be imported ({error}): pip install sweeps, or sweep with --where wandb"
        ) from None


def lease_number(path):
    """K of NNNN.lease-K; 0 for any other name, such as the conflict copy that a shared folder makes."""
    match = re.fullmatch(r"[0-9]{4}\.lease-([1-9][0-9]*)", path.name)
    return int(match[1]) if match else 0


class Lease:
    """Keeps a lease's time stamp fresh in a thread; asks the trial to end if another worker has created the next."""

    def __init__(self, path, request, seconds):
        self._path, self._request, self._pause = path, request, seconds / 6
        self._next, self._stop = path.with_suffix(f".lease-{lease_number(path) + 1}"), threading.Event()
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)

    def is_lost(self):
        """Whether another worker has taken the trial over; then its request says so."""
        if lost := self._next.exists():
            self._request.ask("lost", TAKEN_OVER)
        return lost

    def _work(self):
        while not self._stop.wait(self._pause) and not self.is_lost():
            with contextlib.suppress(OSError):  # a shared folder that cannot be reached for a moment
                os.utime(self._path)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()


if LOOK:
    with tempfile.TemporaryDirectory() as scratch:
        print("created by the first, by the second:", *(create_whole(Path(scratch) / "lease-1", "") for _ in range(2)))


# %%
NO_RESULT = {"state": "running", "reason": "", "rows": [], "released": 0}  # of a trial whose file is not there, or cut
STATES = ("running", "finished", "stopped", "failed", "interrupted")


def read_result(path, metric="val_bpb"):
    """{"state", "reason", "rows", "released"} in a trial's NNNN.result.json; NO_RESULT if it holds anything else.

    metric: the figure that each of its rows must have.
    """
    result = {**NO_RESULT, **(read_json_or_none(path) or {})}
    rows = result["rows"]
    sound = result["state"] in STATES and isinstance(result["reason"], str) and isinstance(result["released"], int)
    sound = sound and isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    sound = sound and all(is_number(row.get(name)) for row in rows for name in ("step", metric))
    return {name: result[name] for name in NO_RESULT} if sound else NO_RESULT


def is_proposal(parameters, sweep):
    """Whether a trial's parameters, a dict or None, are some that the search can have proposed for a sweep."""
    if parameters is None or parameters.keys() != sweep["parameters"].keys():
        return False
    kept = all(parameters[name] == value for name, value in constants(sweep).items())
    swept = ((parameters[name], spec) for name, spec in swept_fields(sweep).items())
    return kept and all(value in spec["values"] if "values" in spec else is_number(value) for value, spec in swept)


class LocalSweep:
    """A sweep in a folder: sweep.json; NNNN.json, NNNN.lease-K and NNNN.result.json a trial; trial-NNNN/ is its run."""

    def __init__(self, folder, sweep, lease=60.0, give_up=0):
        self.folder, self._seconds, self._give_up, self._search = Path(folder), lease, give_up, load_search()
        self._seen, path = {}, self.folder / "sweep.json"  # _seen: {lease: (time stamp, when it was first seen)}
        if not path.exists():
            self._check_search(sweep)
            require_writable(self.folder, "choose another --out")
            create_whole(path, json.dumps(sweep, indent=2) + "\n")
        self.sweep = read_json_or_none(path)
        require(self.sweep, "sweep", str(path), "cannot be read: delete it, or use another --name")
        check_origin(self.sweep, str(path), "name", "run_cap")
        require_writable(self.folder, "choose another --out")
        clear_abandoned(self.folder)
        self._check_search(self.sweep)
        if self.sweep != json.loads(json.dumps(sweep)):
            say(f"sweep: {self.folder} holds one with other settings; continuing with that one, unchanged")

    def _check_search(self, sweep):
        """UserError if the search cannot propose a first trial or stop one, before anything is written."""
        try:
            self._search.next_run(sweep, [])
            if "early_terminate" in sweep:
                self._search.stop_runs(sweep, [])
        except Exception as error:  # jsonschema's, and whatever else its functions run into
            remedy = f"the search refuses this sweep ({first_line(error)}); change SPACE or --method"
            raise UserError(f"method={sweep['method']!r}: {remedy}") from None

    def trials(self):
        """[{"name", "parameters", "state", "reason", "rows"}, ...] of all trials, in their order."""
        return [self._read(path) for path in sorted(self.folder.glob("[0-9][0-9][0-9][0-9].json"))]

    def _read(self, path):
        # The lease first: a worker that takes the trial after that creates a newer one, and what is read is not used.
        leases = map(lease_number, self.folder.glob(f"{path.stem}.lease-*"))
        result = read_result(path.with_suffix(".result.json"), metric_of(self.sweep))
        lease = max(leases, default=0)
        parameters = read_json_or_none(path)
        if not is_proposal(parameters, self.sweep):  # cut where files cannot be created whole, or changed by hand
            what = "is not a trial of this sweep" if parameters else "cannot be read"
            parameters, result = {}, {**NO_RESULT, "state": "failed", "reason": f"{path.name} {what}"}
        return {"name": path.stem, "parameters": parameters, **result, "lease": lease}

    def write(self, name, state, reason="", rows=None, released=0):
        """Notes a trial's state; rows stay as they were unless given; `released` is a lease given back."""
        path = self.folder / f"{name}.result.json"
        rows = read_result(path, metric_of(self.sweep))["rows"] if rows is None else rows
        write_json(path, {"state": state, "reason": reason, "rows": rows, "released": released})

    def _lease(self, trial, number):
        return self.folder / f"{trial['name']}.lease-{number}"

    def _is_free(self, trial):
        """Whether no worker has this open trial; None while that is not known yet."""
        if trial["lease"] == trial["released"]:  # 0 for one that no worker has had
            return True
        return self._is_silent(self._lease(trial, trial["lease"]))

    def _is_silent(self, lease):
        """Whether a lease has not been renewed for that long; None while that is not known yet.

        A time stamp may be days off, by the clock of another machine. One that lies ahead counts by the time for which
        this worker has seen it unchanged. One that is old is watched for two renewals first: its worker may be alive.
        """
        try:
            now, stamp = time.monotonic(), lease.stat().st_mtime_ns
        except FileNotFoundError:
            return True
        if self._seen.get(lease, (None, now))[0] != stamp:
            self._seen[lease] = stamp, now
        unchanged = now - self._seen[lease][1]
        if unchanged <= self._seconds and age_of(lease) <= self._seconds:
            return False
        return True if unchanged > self._seconds / 3 else None

    def claim(self):
        """(trial, lease) that is this worker's now: one left behind, or a new one; None if there is nothing to do."""
        while True:
            # First: numbers of trials that are gone, too, and none of a trial that another worker is about to create.
            used = [int(path.name[:4]) for path in self.folder.glob("[0-9][0-9][0-9][0-9].*")]
            trials = self.trials()
            open_ones = [trial for trial in trials if trial["state"] in ("running", "interrupted")]
            fates = [(trial, self._is_free(trial)) for trial in open_ones]
            free = next((trial for trial, is_free in fates if is_free), None)
            if free:
                lease = self._lease(free, free["lease"] + 1)
                if create_whole(lease, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n"):
                    self.write(free["name"], "running")
                    return free, lease
            elif any(is_free is None for _, is_free in fates):  # one left behind comes before a new one
                return None
            elif len(trials) >= self.sweep["run_cap"] or not self._propose(trials, used):
                return None

    def _propose(self, trials, used):
        """Creates the next trial, by the search, unless another worker was faster; false when a grid is used up.

        Its number is the next one up, and after 9999 the first that is free.
        """
        with warnings.catch_warnings(action="ignore"):  # scikit-learn's, on the fit of five points
            proposed = self._search.next_run(self.sweep, self._as_runs(trials))
        if proposed is None:
            return False
        values = {name: entry["value"] for name, entry in proposed.config.items()}
        values = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
        taken = {*used, *(int(trial["name"]) for trial in trials)}
        top = max(taken, default=0)
        number = next((n for n in (*range(top + 1, 10_000), *range(1, top)) if n not in taken), None)
        if number is None:
            return False
        create_whole(self.folder / f"{number:04d}.json", json.dumps(values) + "\n")
        return True

    def _as_runs(self, trials):
        """The trials as the search knows them."""
        states, metric = {"interrupted": "running", "stopped": "finished"}, metric_of(self.sweep)
        return [
            self._search.SweepRun(
                name=trial["name"],
                state=states.get(trial["state"], trial["state"]),
                config={name: {"value": value} for name, value in trial["parameters"].items()},
                sampledHistory=[{metric: row[metric]} for row in trial["rows"]],
            )
            for trial in trials
            if trial["parameters"]
        ]

    def _note_evaluation(self, name, lease, request, rows):
        """Writes down a running trial's rows and asks Hyperband whether it should continue."""
        if lease.is_lost():
            return
        self.write(name, "running", rows=rows)
        if "early_terminate" in self.sweep:
            if name in [run.name for run in self._search.stop_runs(self.sweep, self._as_runs(self.trials()))]:
                share = f"{len(rows)} of {constants(self.sweep)['evaluations']}"
                request.ask("stopped", f"by Hyperband, {rows[-1][metric_of(self.sweep)]:.3f} after evaluation {share}")

    def run_next(self, corpus, interrupt):
        """Claims and runs one trial; its name and TrialEnd, or None if there is nothing to do.

        UserError, one line, if the folder takes nothing any more.
        """
        try:
            return self._run_next(corpus, interrupt)
        except OSError as error:
            raise cannot_write(self.folder, error, "what ran is kept, the same command continues the sweep") from None

    def _run_next(self, corpus, interrupt):
        claimed = self.claim()
        if claimed is None:
            return None
        trial, path = claimed
        name, request = trial["name"], Request()
        lease = Lease(path, request, self._seconds)
        note = functools.partial(self._note_evaluation, name, lease, request)
        say(f"trial {name}: {describe_parameters(trial['parameters'], self.sweep)}")
        listens = {"on_evaluation": note, "is_lost": lease.is_lost, "metric": metric_of(self.sweep)}
        job = Job(name, trial["parameters"], self.folder / f"trial-{name}", request, **listens)
        with lease:
            outcome = self._run(job, corpus, interrupt)
        if outcome.state != "lost":
            self.write(name, *outcome, released=trial["lease"] + 1 if outcome.state == "interrupted" else 0)
        return name, outcome

    def _run(self, job, corpus, interrupt):
        if os.environ.get("WANDB_MODE") != "offline":
            return run_trial(job, corpus, interrupt)
        names = {"project": "onechip", "group": self.sweep["name"], "config": job.parameters, "dir": self.folder}
        run = load_wandb().init(id=f"{self.sweep['name']}-{job.name}", resume="allow", **names)
        return run_recorded(run, job, corpus, interrupt)

    def waits(self):
        """Whether other workers have trials that may yet come back."""
        return any(trial["state"] in ("running", "interrupted") for trial in self.trials())

    def work(self, corpus, count=0):
        """Runs trials until the sweep is over, `count` are done, too many in a row have failed, or Ctrl-C."""
        failures, ran, waiting = 0, 0, False
        with deferred_interrupt() as interrupt:
            while not interrupt.requested and not (count and ran >= count):
                done = self.run_next(corpus, interrupt)
                if done is None:
                    if not self.waits():
                        return
                    if not waiting:
                        say("waiting for the trials of other workers, in case one of them is left behind")
                    waiting = True
                    time.sleep(min(5.0, self._seconds / 6))
                    continue
                ran, waiting = ran + 1, False
                say(f"trial {done[0]}: {describe_outcome(done[1])}")
                failures = failures + 1 if done[1].state == "failed" else 0
                require(not self._give_up or failures < self._give_up, "failed trials in a row", failures, GIVE_UP)


GIVE_UP = "many failures in a row rarely come from the settings: see the reasons in the table; --give_up 0 never stops"


def describe_parameters(parameters, sweep):
    """The swept values in one line."""
    return ", ".join(f"{name} {format_value(parameters.get(name))}" for name in swept_fields(sweep))


def describe_outcome(outcome):
    """An TrialEnd in one line."""
    return outcome.state + (f": {outcome.reason}" if outcome.reason else "")


def format_value(value):
    """A value in a few characters; nothing for None."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# %% [markdown]
# ## With wandb
#
# wandb's server proposes, stops and counts; any number of workers ask it. Its agent runs each trial as a function in a
# thread. Three of its habits decide what that function does:
#
# - **It gives up after three errors in a minute.** A failed trial is therefore marked as failed but raises nothing.
# - **It hands a run out again only if the run was marked as preempting** and then fell silent or ended with an exit
#   code other than 0. Every trial is marked, once it is known to fit. One that fails after that ends with exit code 0,
#   its state and reason in the summary; otherwise it would come back for ever.
# - **It counts whatever is logged.** A run that comes back logs no evaluation twice.


# %%
def load_wandb():
    """wandb, ready for use, with its key from the environment or Colab's secrets; UserError without it."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"wandb cannot be imported ({error}): pip install wandb, or sweep with --where local") from None
    if key := read_secret("WANDB_API_KEY"):
        os.environ["WANDB_API_KEY"] = key  # where its own process looks
    try:
        wandb.setup()  # starts that process, and has every error print a traceback from then on
    except Exception as error:  # wandb's and the system's
        raise UserError(f"wandb cannot be started ({first_line(error)}): sweep with --where local") from None
    report_in_one_line()
    return wandb


class Recorder:
    """Passes a trial's start and scores on to an open wandb run, which may have scores from before."""

    def __init__(self, run, job):
        self._run, self._job, self.started = run, job, False
        self._logged = run.summary.get("trained_steps", 0) if run.resumed else 0
        run.define_metric("trained_steps")
        run.define_metric("*", step_metric="trained_steps")

    def start(self, config):
        """Marks the run: from now on wandb hands it out again if its worker falls silent."""
        self._run.mark_preempting()
        self.started = True
        self._job.on_start(config)

    def log(self, rows):
        """Logs those evaluations that wandb does not have."""
        for row in rows:
            if row["step"] > self._logged:
                scores = {name: value for name, value in row.items() if name.startswith(("val_", TASKS))}
                self._run.log({"trained_steps": row["step"], **scores})
                self._logged = row["step"]
        self._job.on_evaluation(rows)

    def finish(self, outcome):
        """Records how the trial ended and finishes the run."""
        if outcome.state == "interrupted" and not self.started:
            self._run.mark_preempting()
        self._run.summary.update({"outcome": outcome.state, "reason": outcome.reason})
        if outcome.state == "failed":
            self._run.tags = (*(self._run.tags or ()), "failed")
        again = outcome.state in ("interrupted", "lost")
        self._run.finish(exit_code=1 if again or (outcome.state == "failed" and not self.started) else 0)


def run_recorded(run, job, corpus, interrupt=None):
    """Runs a Job, records its evaluations and its TrialEnd in an open wandb run and finishes it; the TrialEnd."""
    recorder = Recorder(run, job)
    outcome = run_trial(job._replace(on_start=recorder.start, on_evaluation=recorder.log), corpus, interrupt)
    recorder.finish(outcome)
    return outcome


class WandbSweep:
    """A sweep on wandb's server; `path` is entity/project/id."""

    def __init__(self, path, out, give_up=0):
        self._wandb, self.path = load_wandb(), path
        self.sweep = self._find().config
        self.sweep.setdefault("name", path.rpartition("/")[2])
        check_origin(self.sweep, path)
        require(is_below(self.sweep["name"]), "name of the sweep", self.sweep["name"], BELOW)
        self.folder = Path(out) / self.sweep["name"]  # of the sweep's name: its creator finds its trials there
        self._give_up, self._failures = give_up, 0

    def _find(self):
        try:
            return self._wandb.Api().sweep(self.path)
        except Exception as error:  # wandb's and the network's
            raise UserError(f"sweep={self.path!r}: wandb does not find it ({first_line(error)})") from None

    def _run_one(self, corpus, interrupt):
        run = self._wandb.init(resume="allow")  # the agent has set the id, and what to try
        parameters = dict(run.config)
        say(f"trial {run.id}: {describe_parameters(parameters, self.sweep)}")
        job = Job(run.id, parameters, self.folder / f"trial-{run.id}", Request(), metric=metric_of(self.sweep))
        outcome = run_recorded(run, job, corpus, interrupt)
        say(f"trial {run.id}: {describe_outcome(outcome)}")
        self._failures = self._failures + 1 if outcome.state == "failed" else 0
        if self._give_up and self._failures >= self._give_up:
            _thread.interrupt_main()  # the only way to end the agent from here

    def work(self, corpus, count=0):
        """Runs an agent until the sweep is over, `count` trials are done, too many have failed, or Ctrl-C."""
        with deferred_interrupt(raise_at_once=True) as interrupt:  # it ends the agent, and the trial knows why
            entity, project, name = self.path.split("/")
            run_one = functools.partial(self._run_one, corpus, interrupt)
            self._wandb.agent(name, run_one, entity=entity, project=project, count=count or None)
        failures = self._failures
        require(not self._give_up or failures < self._give_up, "failed trials in a row", failures, GIVE_UP)

    def trials(self):
        """[{"name", "parameters", "state", "reason", "rows"}, ...] of all trials."""
        return [self._describe(run) for run in self._find().runs]

    def _describe(self, run):
        keys = ["trained_steps", metric_of(self.sweep)]
        history = run.history(samples=1000, keys=keys, pandas=False)  # all there are: one per evaluation
        rows = [{"step": int(row[keys[0]]), keys[1]: row[keys[1]]} for row in history]
        summary = dict(run.summary)
        state, reason = summary.get("outcome", run.state), summary.get("reason", "")
        return {"name": run.id, "parameters": dict(run.config), "state": state, "reason": reason, "rows": rows}

    def record(self, rows, picture):
        """Puts the table and the picture into a run of their own, next to the sweep's runs."""
        entity, project, name = self.path.split("/")
        names = {"entity": entity, "project": project, "id": f"results-{name}", "name": f"results of {name}"}
        with self._wandb.init(resume="allow", job_type="results", **names) as run:
            columns = list(rows[0])
            results = self._wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in rows])
            run.log({"results": results, "picture": self._wandb.Image(str(picture))})


def create_online(sweep, project, folder):
    """The path, entity/project/id, of this sweep on wandb's server: created there, unless this machine has a note."""
    note = Path(folder) / "wandb_sweep.txt"  # so that Run all after a disconnect creates no second one
    if note.exists():
        return note.read_text().strip()
    wandb = load_wandb()
    try:
        name = wandb.sweep(sweep, project=project)
    except Exception as error:  # wandb's and the network's
        raise UserError(f"project={project!r}: wandb did not take the sweep ({first_line(error)})") from None
    path = f"{os.environ.get('WANDB_ENTITY') or wandb.Api().default_entity}/{project}/{name}"
    write_text(note, path + "\n")
    say(f"sweep: {path}; other workers join it with --sweep {path}")
    return path


# %% [markdown]
# ## What came out
#
# One row per trial, sorted by the score. The table says what the trials had in common, tokens or FLOPs, since a
# ranking of model sizes means nothing without it. A trial that was stopped early is listed with the score it had then.


# %%
def tabulate(backend):
    """The rows of the table, best first: trial, state, score or None, steps, tokens, flops, swept values, reason."""
    rows = [tabulate_trial(trial, backend.sweep) for trial in backend.trials()]
    return sorted(rows, key=lambda row: cost_of(row[metric_of(backend.sweep)], backend.sweep))


def tabulate_trial(trial, sweep):
    """One row of the table, as a dict."""
    metric = metric_of(sweep)
    best = min((row[metric] for row in trial["rows"]), key=lambda score: cost_of(score, sweep), default=None)
    steps = max((row["step"] for row in trial["rows"]), default=0)
    row = {"trial": trial["name"], "state": trial["state"], metric: best, "steps": steps, "tokens": 0, "flops": 0.0}
    with contextlib.suppress(ValueError, KeyError, TypeError):  # what could not be built has not trained
        config = trial_config(trial["parameters"])
        row["tokens"] = steps * config.total_batch_size * config.seq_len
        model = train.model_named(trial["parameters"]["model"])
        row["flops"] = row["tokens"] * train.flops_per_token(config, model)
    values = {name: trial["parameters"].get(name) for name in swept_fields(sweep)}
    return {**row, **values, "reason": trial["reason"]}


def describe_table(rows, sweep):
    """The table as text, below a line that says what was equal."""
    fixed, names, metric = constants(sweep), swept_fields(sweep), metric_of(sweep)
    size = f"{fixed['budget_size']:,.0f} tokens" if fixed["budget"] == "tokens" else f"{fixed['budget_size']:.3g} FLOPs"
    body = [
        [
            *(row["trial"], row["state"], "" if row[metric] is None else f"{row[metric]:.4f}", str(row["steps"])),
            *(f"{row['tokens'] / 1e6:.2f}M", f"{row['flops']:.2e}"),
            *(format_value(row[name]) for name in names),
            row["reason"],
        ]
        for row in rows
    ]
    heads = ["trial", "state", metric, "steps", "tokens", "FLOPs", *names, ""]
    return f"{sweep['name']}: equal {fixed['budget']}, {size} a trial\n{table(body, heads)}"


RESULTS = ("results.csv", "results.png")


def check_results(folder):
    """UserError, one line, if a sweep's table or picture cannot be where it belongs."""
    for path in (Path(folder) / name for name in RESULTS):
        require(not path.is_dir(), "sweep", str(path), "is a folder, and the results go there: move it elsewhere")


def write_table(rows, path):
    """Writes the table as a CSV file."""
    with atomic_write(path) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def best_config(backend):
    """The Config of the best trial that ran to its end, ready for 02; UserError if there is none."""
    names = {trial["name"]: trial["parameters"] for trial in backend.trials()}
    done = [row for row in tabulate(backend) if row["state"] == "finished"]
    require(done, "sweep", backend.sweep["name"], "no trial has finished yet: run more of them")
    return trial_config(names[done[0]["trial"]])


# %% cellView="form"
# @title The picture
def plot_sweep(trials, rows, sweep, path):
    """Writes a PNG: the score against each swept parameter, and the learning curves; hollow: stopped early."""
    from matplotlib.figure import Figure  # here, because importing it looks for fonts

    names, by_name, metric = list(swept_fields(sweep)), {trial["name"]: trial for trial in trials}, metric_of(sweep)
    scored = [row for row in rows if row[metric] is not None]
    across = min(4, len(names) + 1)
    down = math.ceil((len(names) + 1) / across)
    figure = Figure(figsize=(4 * across, 3 * down), layout="constrained")
    figure.suptitle(f"{sweep['name']}: equal {constants(sweep)['budget']}")
    curves, *panels = figure.subplots(down, across, squeeze=False).flat
    for panel, name in itertools.zip_longest(panels, names):
        if name is None:
            panel.axis("off")
            continue
        logarithmic = "log" in sweep["parameters"][name].get("distribution", "")
        plot_parameter(panel, name, scored, metric, logarithmic)
    for i, row in enumerate(scored):
        points = by_name[row["trial"]]["rows"]
        shade = {"color": "tab:red", "linewidth": 2, "zorder": 3} if i == 0 else {"color": "tab:blue", "alpha": 0.4}
        per_step = row["tokens"] / row["steps"] / 1e6
        curves.plot([p["step"] * per_step for p in points], [p[metric] for p in points], ".-", **shade)
    curves.set(xlabel="million tokens", ylabel="bits per byte, held out" if metric == "val_bpb" else metric)
    curves.grid(alpha=0.3)
    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=110)


def plot_parameter(panel, name, rows, metric, logarithmic):
    """Draws one panel: the score of each trial against one parameter, the best in red."""
    for i, row in enumerate(rows):
        color = "tab:red" if i == 0 else "tab:blue"
        filled = color if row["state"] == "finished" else "none"
        panel.plot([row[name]], [row[metric]], "o", color=color, markerfacecolor=filled)
    panel.set(xlabel=name, xscale="log" if logarithmic else "linear")
    if all(isinstance(row[name], int) for row in rows):
        panel.set_xticks(sorted({row[name] for row in rows}))
    panel.grid(alpha=0.3)


# %% [markdown]
# ## Run
#
# Without a key this sweeps on this machine. With a key, and a larger preset than laptop, wandb holds the sweep and its
# id is printed: in every other Colab, or in this one on another day, write `"--sweep ENTITY/PROJECT/ID"` into
# `OVERRIDES`. The same cells run again continue the same sweep. A sweep has its commit and data recorded; a worker that
# has others refuses to mix its trials in.


# %%
def choose_place(settings, run):
    """Who hands out the trials, "wandb" or "local"; prints which and why in a line."""
    online = os.environ.get("WANDB_MODE", "online") == "online"
    asked = bool(settings.where or settings.sweep)
    key = asked or bool(read_secret("WANDB_API_KEY"))
    place = settings.where or ("wandb" if settings.sweep or (key and online and run.preset != "laptop") else "local")
    if asked:
        because = "as set"
    elif not key:
        because = "as there is no key"
    else:
        because = "as there is a key" if place == "wandb" else f"as the preset is {run.preset}"
    say(f"trials: handed out by {'wandb' if place == 'wandb' else 'a folder on this machine'}, {because}")
    return place


def full_path(name, project):
    """entity/project/id of a sweep that was named by its id alone, or by all three."""
    parts = name.strip().strip("/").split("/")
    require(len(parts) in (1, 3) and all(parts), "sweep", name, "give its id, or entity/project/id")
    return "/".join(parts if len(parts) == 3 else [load_wandb().Api().default_entity, project, *parts])


def check_version(sweep, corpus, any_version):
    """Raises UserError if commit or data here are not the sweep's; with `any_version` it prints that instead."""
    expected, here = constants(sweep), {"commit": git_commit() or ""}
    here |= {"data_name": corpus.name, "data_revision": corpus.revision}
    for name, value in here.items():
        if expected[name] != value and any_version:
            say(f"{name}: the sweep has {expected[name]!r}, here it is {value!r}; continuing, as set")
        else:
            remedy = f"the sweep has {expected[name]!r}; use that (REF), or set --any_version true"
            require(expected[name] == value, name, value, remedy)


ASKED = ("base", "mixture", "conversations", "data", "model", "optimizer", "out")  # what a SweepTask may look at


def read_settings(overrides):
    """(Settings, Run, fields of the Config that are set, SweepChoice) from what the user set."""
    asked = {name: peek(name, overrides) for name in ASKED}
    subject = task_of({"task": peek("task", overrides) or "pretraining"})
    if peek("sweep", overrides):  # which says what is trained
        subject, asked = PRETRAINING, asked | dict.fromkeys(("base", "mixture", "conversations"), "")
    choice = subject.choose(asked)
    config_class = config_of_names(choice.model, choice.optimizer)
    settings, run, fields = parse_settings(Settings, Run, config_class, overrides=overrides)
    check_kept({"model": choice.model, "optimizer": choice.optimizer, **choice.facts}, fields)
    return Settings(**settings), Run(**run), fields, choice


def check_facts(sweep, facts):
    """UserError if a sweep is of another task than the one chosen here, or begins with other weights or moments."""
    known, task = constants(sweep), facts.get("task", "pretraining")
    trained = known.get("task", "pretraining")
    require(trained == task, "task", task, f"the sweep is of {trained}: use another --name")
    same = known.get("base_sha256") == facts.get("base_sha256")
    require(
        same,
        "base",
        facts.get("base"),
        f"the sweep began with other weights or moments, of {known.get('base')}: use those",
    )


def join_sweep(path, settings, asked, run):
    """(backend, material) of a sweep on wandb's server; what is not set here is as the sweep has it."""
    backend = WandbSweep(path, Path(run.out), settings.give_up)
    fixed = constants(backend.sweep)
    kept = {"name": fixed["data_name"], "revision": fixed["data_revision"]}
    task, data = task_of(fixed), asked.data or fixed["data"] or run.data
    if task is PRETRAINING:
        return backend, tok.get_corpus(data, fixed["num_shards"], kept)
    wanted = {name: fixed[name] for name in ("model", "optimizer")} | {"data": data, "out": run.out}
    wanted |= {"base": settings.base or fixed["base"], "mixture": settings.mixture or fixed["mixture"]}
    choice = task.choose(wanted | {"conversations": settings.conversations})
    check_facts(backend.sweep, choice.facts)
    return backend, choice.open(data, fixed["num_shards"], kept)


def open_sweep(overrides):
    """(backend, settings, material) from what the user set: creates the sweep or finds it, and checks it."""
    settings, asked, fields, choice = read_settings(overrides)
    require(asked.hosts < 2, "hosts", asked.hosts, "a trial runs on one host: start a worker on each")
    run, config = settle(asked, config_of_names(choice.model, choice.optimizer), choice.presets, fields)
    place, out = choose_place(settings, run), Path(run.out)
    require_writable(out, "choose another --out")
    os.environ.setdefault("WANDB_DIR", str(out))
    if settings.sweep:
        backend, material = join_sweep(full_path(settings.sweep, settings.project), settings, asked, run)
    else:
        material = choice.open(run.data, run.num_shards, None)
        settings = dataclasses.replace(settings, model=choice.model)
        run = dataclasses.replace(run, optimizer=choice.optimizer)
        sweep = make_sweep(settings, run, config, choice.spaces[run.preset], material, choice.facts)
        check_sweep(sweep)
        folder = out / sweep["name"]
        if place == "wandb":
            backend = WandbSweep(create_online(sweep, settings.project, folder), out, settings.give_up)
        else:
            backend = LocalSweep(folder, sweep, settings.lease, settings.give_up)
        check_facts(backend.sweep, choice.facts)
    check_version(backend.sweep, material, settings.any_version)
    check_results(backend.folder)
    return backend, settings, material


def describe_cost(backend):
    """What the sweep holds and, if the time of a step is known, what it costs at most."""
    configs, cap = check_sweep(backend.sweep), backend.sweep.get("run_cap", 1000)
    line = f"sweep: {backend.folder}: {cap} trials of equal {constants(backend.sweep)['budget']} over "
    line += ", ".join(swept_fields(backend.sweep))
    middle, known = configs[len(configs) // 2], constants(backend.sweep)
    if "TPU" not in jax.local_devices()[0].device_kind:
        return line
    try:
        parts = {"optimizer": train.optimizer_named(known["optimizer"]), "batch": task_of(known).arrays}
        fit = train.preflight(middle, model=train.model_named(known["model"]), **parts)
    except DoesNotFit as error:
        return f"{line}\nnot all of it fits this device: {error}"
    if not fit.step_seconds:
        return line
    hours = fit.step_seconds * middle.num_iterations * cap / 3600
    cost = f"at {fit.step_seconds:.2f} s a step, as estimated: {hours:.1f} chip hours, less what is stopped early"
    return f"{line}\n{cost}"


# %% [markdown]
# A host with several chips has a choice. With `--chips all` a worker trains each trial on all of them. With
# `--chips one` there is a worker for each chip, a process that sees no other: as many trials run side by side, none
# waits for another, and no step waits for a collective. Take `one` where a trial fits a chip.


# %%
def run_worker(overrides=""):
    """Opens the sweep and runs its trials, as the cells below do."""
    prepare()
    backend, settings, corpus = open_sweep(overrides)
    say(f"{OPENED_SWEEP} {backend.folder}")
    say(describe_cost(backend))
    backend.work(corpus, settings.count)


OPENED_SWEEP = "worker: has opened"
ONE_WORKER = "import importlib; importlib.import_module('03_worker').run_worker()"


def work_on_each_chip(overrides):
    """Runs a worker for each chip of this host, until all have ended; UserError if none of them did as it should."""
    read_settings(overrides)  # what is wrong with them is said once
    folder = str(Path(tok.__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", ONE_WORKER, *words_of(overrides), "--chips", "all"]
    codes = run_on_each_chip(command, OPENED_SWEEP)
    require(0 in codes, "chips", "one", "no worker ran to its end: their lines above say why")


# %%
OVERRIDES = ""  # @param ["", "--where wandb", "--budget flops --run_cap 20"] {allow-input: true}

if __name__ == "__main__":
    prepare()
    if peek("chips", OVERRIDES) == "one":  # first: a process that asks what devices there are has them all
        work_on_each_chip(OVERRIDES)
    backend, settings, corpus = open_sweep(OVERRIDES)
    say(describe_cost(backend))

# %% [markdown]
# The worker. Run this cell again for more trials. On a second Colab the same two cells, with the sweep's id, are a
# second worker.

# %%
if __name__ == "__main__":
    if settings.chips == "all":
        backend.work(corpus, settings.count)

# %% [markdown]
# ## Look
#
# The best trial is red; a trial that was stopped early is hollow. A best value at the edge of its range asks for a
# wider range; a parameter whose panel shows no slope need not be swept. The winner goes to 02 by the line that is
# printed, at the length of a real run.


# %%
def show_results(backend):
    """Prints the table, saves it as results.csv, draws results.png, and puts both into wandb if the sweep is there."""
    rows, (csv_file, picture) = tabulate(backend), (backend.folder / name for name in RESULTS)
    require(rows, "sweep", backend.sweep["name"], "has no trial yet")
    say(describe_table(rows, backend.sweep))
    check_results(backend.folder)
    try:
        write_table(rows, csv_file)
        plot_sweep(backend.trials(), rows, backend.sweep, picture)
    except OSError as error:
        raise cannot_write(backend.folder, error, "the table is above; the same command writes it again") from None
    say(f"left in {backend.folder}: {csv_file.name}, {picture.name}, and a folder for each trial")
    with contextlib.suppress(UserError):  # none has run to its end
        best = dataclasses.asdict(best_config(backend))
        known, swept = constants(backend.sweep), swept_fields(backend.sweep)
        say(" ".join([f"best: {task_of(known).command(known)}", *(f"--{name} {best[name]}" for name in swept)]))
    if isinstance(backend, WandbSweep):
        backend.record(rows, picture)
    show_picture(picture)


if __name__ == "__main__":
    show_results(backend)
