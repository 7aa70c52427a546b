"""Settings: dataclasses are the only list of what can be set, on a command line and in a notebook alike."""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import os
import shlex
import sys
from pathlib import Path, PurePath
from typing import NamedTuple

from onechip.errors import UserError, in_notebook, require, say
from onechip.hosts import host_count
from onechip.join import check_hosts, join_hosts
from onechip.stages import count_tokens

LARGEST = 2**63 - 1  # of an int without a bound of its own: what 64 bits hold


class Rule(NamedTuple):
    """What a setting's value must satisfy besides its type; None: no such bound."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple | None = None
    why: str = ""

    def allows(self, value):
        """Whether a value of the right type keeps to the rule."""
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
            and (self.choices is None or value in self.choices)
        )

    def range(self, kind):
        """(what --help shows, what a refusal says) for a field of type `kind`; empty strings without a bound."""
        if self.choices is not None:
            names = [str(choice) for choice in self.choices]
            shown = " or ".join(names) if len(names) == 2 else f"one of {', '.join(names)}"
            return shown, f"use {shown}"
        low = self.at_least if self.above is None else self.above
        high = self.at_most if self.below is None else self.below
        if low is not None and high is not None:
            left, right = "[" if self.above is None else "(", "]" if self.below is None else ")"
            return f"in {left}{low}, {high}{right}", f"must lie in {left}{low}, {high}{right}"
        if self.at_least == 0:
            return "not negative", "must not be negative"
        shown = self._one_bound(kind)
        return shown, f"must be {shown}"

    def _one_bound(self, kind):
        if self.above is not None:
            return f"greater than {self.above}"
        if self.at_least is not None:
            return "a positive integer" if kind is int and self.at_least == 1 else f"at least {self.at_least}"
        if self.below is not None:
            return f"less than {self.below}"
        return "" if self.at_most is None else f"at most {self.at_most}"


def setting(default, help, *, fixed=False, above=None, at_least=None, below=None, at_most=None, choices=None, why=""):
    """A dataclass field of type bool, int, float or str: its default, its line in `--help`, and its rule.

    fixed: a run keeps this value from its first step to its last. above, at_least, below, at_most: bounds of a number.
    choices: the values to choose from. why: the reason for the rule, added to a refusal.
    """
    rule = Rule(above, at_least, below, at_most, choices and tuple(choices), why)
    return dataclasses.field(default=default, metadata={"help": help, "fixed": fixed, "rule": rule})


def change_default(config_class, name, default):
    """A field of a class with another default, for a class derived from it; help and rule stay."""
    (field,) = (field for field in dataclasses.fields(config_class) if field.name == name)
    return dataclasses.field(default=default, metadata=field.metadata)


def fixed_fields(config_class):
    """Names of the fields that a run keeps from its first step to its last."""
    return [field.name for field in dataclasses.fields(config_class) if field.metadata.get("fixed")]


def check_fields(config):
    """Raises UserError for the first field of a dataclass that is not of its type or breaks its rule."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        check_type(name, value, field.type)
        rule = field.metadata.get("rule", Rule())
        if field.type is int and rule.at_most is None:
            require(-LARGEST <= value <= LARGEST, name, value, f"must fit into 64 bits: at most {LARGEST}")
        remedy = rule.range(field.type)[1]
        require(rule.allows(value), name, value, f"{remedy}: {rule.why}" if rule.why else remedy)


def check_type(name, value, kind):
    """Raises UserError unless a value is of type `kind`: a float may be an int, but a number is never a bool."""
    if kind is bool:
        require(isinstance(value, bool), name, value, "must be true or false")
    elif kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(is_number and is_finite(value), name, value, "must be a finite float")
    elif kind is int:
        require(isinstance(value, int) and not isinstance(value, bool), name, value, "must be a finite int")
    else:
        require(isinstance(value, kind), name, value, f"must be a {kind.__name__}")


def is_finite(number):
    """Whether an int or a float is a finite number as a float."""
    try:
        return math.isfinite(number)
    except OverflowError:  # an int beyond the largest float
        return False


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{shorten(message)}. --help lists every setting")


def shorten(text):
    """A text of at most 300 characters, the beginning and the end of a longer one."""
    return text if len(text) <= 300 else f"{text[:200]}...{text[-50:]}"


def boolean(text):
    """True or False from true or false, yes or no, 1 or 0."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(text)
    return text.lower() in ("true", "1", "yes")


def describe_field(field):
    """A field's line in `--help`: what it means, its default and its range."""
    default = str(field.default).lower() if field.type is bool else repr(field.default)
    shown = field.metadata.get("rule", Rule()).range(field.type)[0]
    return f"{field.metadata.get('help', '')} (default: {default}{'; ' if shown else ''}{shown})"


def _make_parser(classes):
    parser = _Parser(prog=Path(sys.argv[0]).name, allow_abbrev=False, usage="%(prog)s [--name value ...]")
    for cls in classes:
        group = parser.add_argument_group(cls.__name__, (cls.__doc__ or "").strip().splitlines()[0])
        for field in dataclasses.fields(cls):
            group.add_argument(
                f"--{field.name}",
                type=boolean if field.type is bool else field.type,
                default=argparse.SUPPRESS,
                **({"nargs": "?", "const": True} if field.type is bool else {}),
                metavar=field.type.__name__.upper(),
                help=describe_field(field).replace("%", "%%"),
            )
    return parser


def words_of(overrides):
    """The words that a user set: those of the text `overrides`, and in a script the command line's after them."""
    try:
        words = shlex.split(overrides)
    except ValueError as error:
        raise UserError(f"{shorten(overrides)!r}: {error}. Write it as on a command line") from None
    return words if in_notebook() else words + sys.argv[1:]


def parse_settings(*classes, overrides=""):
    """What a user set, as one dict of field values per dataclass in `classes`.

    In a notebook that is the text `overrides` ("--n_head 4 --data offline"), in a script the command line after it.
    Raises UserError on a wrong name, with the nearest right one, and on a value of the wrong type.
    """
    given, unknown = _make_parser(classes).parse_known_args(words_of(overrides))
    if unknown:
        names = [field.name for cls in classes for field in dataclasses.fields(cls)]
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], names, n=1)
        hint = f"; did you mean --{near[0]}?" if near else "."
        raise UserError(f"unknown setting {shorten(unknown[0])!r}{hint} --help lists every setting")
    return [{f.name: getattr(given, f.name) for f in dataclasses.fields(cls) if f.name in given} for cls in classes]


def peek(name, overrides=""):
    """The text that a user set for one setting, before it is known which others there are; "" if none."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    parser.add_argument(f"--{name}", default="", nargs="?", const="true")  # without a value: a bool, or refused later
    return getattr(parser.parse_known_args(words_of(overrides))[0], name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What to run, on which data, and where to leave it."""

    export: str = setting(
        "",
        "write a trained --run for other readers: torch, nanochat, qwen3, gguf-bf16, gguf-q8_0, stablehlo, int8",
    )
    run: str = setting("", "run's folder or Hub repository that --export is of")
    preset: str = setting("", "chip, gpu, laptop, or another one of the notebook; empty: by the device")
    optimizer: str = setting("", "adamw or muon; empty: the notebook's own")
    data: str = setting("", "offline, fineweb, climbmix, fineweb10b or a folder of shards; empty: as suits the preset")
    num_shards: int = setting(0, "shards to train on, 50M tokens each (fineweb10b: 100M); 0: as needed", at_least=0)
    name: str = setting("", "name of the run; one that exists is resumed; empty: after its settings")
    other_data: bool = setting(False, "resume a run although its data is of another revision")
    take_over: bool = setting(False, "take the run from another process that has it")
    out: str = setting("runs", "folder for the runs")
    preflight: str = setting("", 'only report what a step needs, "here" or on a TPU not attached: "v6e:1x1", "v5e:2x2"')
    mesh: str = setting("", 'devices: "data=8", or "data=2,fsdp=4", which splits the weights in four; empty: what fits')
    hub_repo: str = setting("", "Hub repository to upload to, if there is a token; empty: <you>/onechip-<name>")
    mirror: str = setting(
        "", "place for checkpoints besides this disk, gs://bucket/folder; whole ones, every weights_minutes"
    )
    weights_minutes: float = setting(15.0, "minutes between uploads of the weights", at_least=0)
    state_minutes: float = setting(65.0, "minutes of work at most that no whole checkpoint elsewhere has", at_least=0)
    session_hours: float = setting(
        0.0, "hours of this process, in which training ends and saves; 0: no limit", at_least=0
    )
    hosts: int = setting(0, "processes that train together, one a host; 0: as Slurm or a TPU slice says", at_least=0)
    host: int = setting(0, "which of them this one is, from 0 on", at_least=0)
    coordinator: str = setting("", "where host 0 is reached, such as 10.0.0.2:8476, a port that is free there")
    host_minutes: float = setting(5.0, "minutes to wait for a host that has not come", above=0)
    units_per_hour: float = setting(0.0, "Colab's compute units an hour, as its Resources panel shows", at_least=0)

    def __post_init__(self):
        check_fields(self)
        require(not self.name or is_below(self.name), "name", self.name, BELOW)


BELOW = "must name a folder below --out, such as exp/1: no .. in it and no / at its ends"


def is_below(name):
    """Whether a name, joined to a folder, is a place below that folder, and is spelled in the shortest way."""
    path = PurePath(name)
    return not path.is_absolute() and bool(path.parts) and ".." not in path.parts and str(path) == name


def name_run(run, config):
    """A name that is the same for the same settings, so that a second start resumes the first."""
    settings = json.dumps([run.data, run.num_shards, dataclasses.asdict(config)], sort_keys=True)
    return f"{run.preset}-{Path(run.data).name}-{hashlib.sha256(settings.encode()).hexdigest()[:6]}"


TOKENS_A_SHARD, MOST_SHARDS = 50e6, 1000
OTHER_SHARDS = {"fineweb10b": (100e6, 103)}  # the same two of shards of tokens
PACKED = 0.6  # of them at least are left by best-fit packing: nanochat measured 65.4 % at 2,048 tokens a row


def choose(config_class, presets, overrides="", run_class=Run, name=name_run):
    """(Run, config) with nothing left open: a preset by the device, then what the user set. Prints what and why.

    name(run, config) -> the name of a Run that has none.
    """
    run, fields = parse_settings(run_class, config_class, overrides=overrides)
    run = run_class(**run)
    join_hosts(run)  # before a device is used
    run, config = settle(run, config_class, presets, fields)
    run = dataclasses.replace(run, name=run.name or name(run, config))
    check_hosts(run, config)
    batch, tokens = f"{config.total_batch_size} x {config.seq_len}", count_tokens(config) / 1e6
    say(f"run: {run.out}/{run.name}: {config.num_iterations:,} steps of {batch} tokens, {tokens:,.1f}M in all")
    return run, config


def settle(run, config_class, presets, fields):
    """(run, config): a Run whose preset, data and number of shards are filled in, and the config that follows."""
    import jax

    device = jax.local_devices()[0]
    preset, because = pick_preset(run, device.platform)
    require(preset in presets, "preset", preset, f"use one of {', '.join(presets)}")
    own = {**presets[preset]}
    preset_data = own.pop("data", "offline" if preset == "laptop" else "fineweb")
    data, config = run.data or preset_data, config_class(**{**own, **fields})
    packed = getattr(config, "packing", "stream") == "best-fit"  # not every config has a choice
    tokens, most = OTHER_SHARDS.get(data, (TOKENS_A_SHARD, MOST_SHARDS))
    used = tokens * (PACKED if packed else 1.0)
    shards = run.num_shards or min(most, math.ceil(count_tokens(config) / used))
    data_because = "as set" if run.data else f"as the preset is {preset}"
    devices = f"{jax.device_count()} x {device.device_kind}"
    devices += f" on {host_count()} hosts" if host_count() > 1 else ""
    say(f"device: {devices} (jax {jax.__version__}, {os.cpu_count()} CPU cores)")
    say(f"preset: {preset}, {because}; data: {data}, {data_because}; --help lists every setting")
    return dataclasses.replace(run, preset=preset, data=data, num_shards=shards), config


def pick_preset(run, platform):
    """(preset, why) of a Run: as set, or by the device it is for."""
    if run.preset:
        return run.preset, "as set"
    if run.preflight not in ("", "here"):
        return "chip", "as --preflight names a TPU"
    return {"tpu": "chip", "cpu": "laptop"}.get(platform, "gpu"), f"as the device is a {platform}"
