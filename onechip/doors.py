"""What a trainer is handed: a Model, an Optimizer, a Task. A Model's table of weights is in weights.py.

Plain tuples of functions. A notebook that brings its own writes the functions and the tuple, and hands it to `train`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax


class Model(NamedTuple):
    """One architecture, each function able to run with a cache.

    name: the notebook and constant that `open_model` finds it by; config: its Config class.
    weights(config) -> its table of Weights.
    embed(config, params, tokens, before) -> the residual stream (B, T, D) of tokens (B, T); before (B, 1) is the token
    ahead of them, -1 or None if there is none.
    block(config, params, i, streams, tokens, attend) -> (the stream after layer i, its part of the cache); streams: the
    stream after the embedding and each layer so far; attend(q, k, v, more=None) -> (B, T, N, H) and that part; more: a
    gate (B, T, K) float32 and rows (B, T, K * H), whose product is added to v.
    Embeddings with a row for each token are read with onechip.rows.lookup, of the tokens that these two are given.
    readout(config, params, streams) -> final hidden states (B, T, D), which lm_head multiplies.
    read(config, arrays) -> its parameters, by their flat names, from an export in another library's format.
    write(config, params, bos) -> (config.json, arrays by name) of such an export; UserError if none computes the same.
    adopt(about) -> fields of its Config, from the config.json of such an export.
    presets: {preset: fields} that suit it, "laptop" say.
    """

    name: str
    config: type
    weights: Callable
    embed: Callable
    block: Callable
    readout: Callable
    read: Callable | None = None
    write: Callable | None = None
    adopt: Callable | None = None
    presets: dict = {}


class Optimizer(NamedTuple):
    """name: what config.json keeps of it. init(config, weights, params) -> its state, a pytree of arrays.

    update(config, weights, params, state, grads, step, spread) -> (params, state) after 0-based step `step`; weights is
    the model's table, of the same structure as params; spread: a Spread (onechip/mesh.py), which shares out work on
    equal matrices over the devices. settings: a dataclass of fields that it needs besides TrainConfig's,
    or with other defaults; presets: {preset: fields} that suit it.
    """

    name: str
    init: Callable
    update: Callable
    settings: type | None = None
    presets: dict = {}


@functools.cache
def config_with(config_class, optimizer_settings):
    """A model's Config class with the fields of an Optimizer's settings, which win; itself if there are none."""
    if optimizer_settings is None:
        return config_class
    about = {"__doc__": config_class.__doc__}
    mixed = type(config_class.__name__, (optimizer_settings, config_class), about)
    return jax.tree_util.register_static(dataclasses.dataclass(frozen=True, kw_only=True)(mixed))


class Task(NamedTuple):
    """batches(position) yields (batch, position after it), from the start if position is None.

    A batch is a dict of NumPy arrays (total_batch_size, ...), with an optional "mask" of the targets that count.
    loss(config, model, params, batch) -> the mean over a batch's targets. score(config, model, mesh) -> a function of
    params -> a dict of figures for metrics.jsonl, with "val_loss" among them. metric: the figure whose lowest value
    marks the best checkpoint. ask(config, model, mesh) -> the same for tasks such as CORE's, every eval_core_every
    steps. origin: JSON that says what the data is; facts: more JSON for config.json; files:
    {name: bytes} that the run keeps, such as its tokenizer. arrays: the names in a batch, each (total_batch_size,
    seq_len), for programs that are compiled before there is one. roll(config, model, mesh) -> a function of (params,
    what `batches` yields) -> ([batch], figures for the step's row): where a step learns from what the model has just
    written; each batch is an update. None: `batches` yields what is learned from. A run with stages cannot have it.
    """

    batches: Callable
    loss: Callable
    score: Callable
    metric: str = "val_loss"
    origin: dict = {}
    facts: dict = {}
    files: dict = {}
    arrays: tuple = ("x", "y")
    ask: Callable | None = None
    roll: Callable | None = None


class SweepTask(NamedTuple):
    """A Task that can be swept: its trials differ in their config, and begin with and learn from the same.

    name: the notebook and constant that it is found by. choose(asked) -> SweepChoice, before a device is used; asked:
    {name: what the user set as text, "" if nothing}. prepare(config, material) -> what `train` is handed of a trial:
    task, and start if it begins with a trained model. command(constants) -> the command that trains with a sweep's
    winner. metric: the figure that is made best; arrays: as a Task has them.
    """

    name: str
    choose: Callable
    prepare: Callable
    command: Callable
    metric: str = "val_loss"
    arrays: tuple = ("x", "y")


class SweepChoice(NamedTuple):
    """What the trials of a sweep have in common, as a SweepTask chose it.

    model, optimizer: as --model and --optimizer name them. presets: {preset: fields}. spaces: {preset: what is swept}.
    open(data, num_shards, kept) -> the material that all learn from, with a name and a revision; kept: those of a sweep
    that is joined. facts: more constants of the sweep, JSON, which a worker must have alike.
    """

    model: str
    optimizer: str
    presets: dict
    spaces: dict
    open: Callable
    facts: dict = {}
