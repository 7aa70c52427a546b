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
from pathlib import Path

from onechip.errors import UserError, print_one_line_errors, require, say
from onechip.machine import in_notebook


def setting(default, help, fixed=False):
    """A dataclass field with a default and the line that `--help` shows for it; fixed: a run never changes it."""
    return dataclasses.field(default=default, metadata={"help": help, "fixed": fixed})


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}. --help lists every setting")


def boolean(text):
    """true or false, yes or no, 1 or 0."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(text)
    return text.lower() in ("true", "1", "yes")


def _make_parser(classes):
    parser = _Parser(prog=Path(sys.argv[0]).name, allow_abbrev=False, usage="%(prog)s [--name value ...]")
    for cls in classes:
        group = parser.add_argument_group(cls.__name__, (cls.__doc__ or "").strip().splitlines()[0])
        for field in dataclasses.fields(cls):
            group.add_argument(
                f"--{field.name}",
                type=boolean if field.type is bool else field.type,
                default=argparse.SUPPRESS,
                metavar=field.type.__name__.upper(),
                help=f"{field.metadata.get('help', '')} (default: {field.default!r})".replace("%", "%%"),
            )
    return parser


def parse_settings(*classes, overrides=""):
    """What a user set, as one dict of field values per dataclass in `classes`.

    In a notebook that is the text `overrides` ("--n_head 4 --data offline"), in a script the command line after it.
    Raises UserError on a wrong name, with the nearest right one, and on a value of the wrong type.
    """
    if not in_notebook():
        sys.excepthook = print_one_line_errors
    words = shlex.split(overrides) + ([] if in_notebook() else sys.argv[1:])
    given, unknown = _make_parser(classes).parse_known_args(words)
    if unknown:
        names = [field.name for cls in classes for field in dataclasses.fields(cls)]
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], names, n=1)
        hint = f"; did you mean --{near[0]}?" if near else "."
        raise UserError(f"unknown setting {unknown[0]!r}{hint} --help lists every setting")
    return [{f.name: getattr(given, f.name) for f in dataclasses.fields(cls) if f.name in given} for cls in classes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What to run, on which data, and where to leave it."""

    preset: str = setting("", "chip, gpu or laptop; empty: by the device")
    data: str = setting("", "offline, fineweb, or a folder of parquet shards; empty: offline for laptop, else fineweb")
    num_shards: int = setting(0, "FineWeb-Edu shards to train on, 50M tokens each; 0: as many as the run needs")
    name: str = setting("", "name of the run; one that exists is resumed; empty: after its settings")
    out: str = setting("runs", "folder for the runs")
    preflight: str = setting("", 'only say what a step needs, "here" or on a TPU that is not: "v6e:1x1", "v5e:2x2"')
    hub_repo: str = setting("", "Hub repository to upload to, where there is a token; empty: <you>/onechip-<name>")
    weights_minutes: float = setting(15.0, "minutes between uploads of the weights")
    state_minutes: float = setting(60.0, "minutes between uploads of whole checkpoints, three times as large")


def name_run(run, config):
    """A name that is the same for the same settings, so that a second start resumes the first."""
    settings = json.dumps([run.data, run.num_shards, dataclasses.asdict(config)], sort_keys=True)
    return f"{run.preset}-{Path(run.data).name}-{hashlib.sha256(settings.encode()).hexdigest()[:6]}"


def choose(config_class, presets, overrides="", run_class=Run):
    """(Run, config) with nothing left open: a preset by the device, then what the user set. Says what and why."""
    run, fields = parse_settings(run_class, config_class, overrides=overrides)
    run, config = settle(run_class(**run), config_class, presets, fields)
    run = dataclasses.replace(run, name=run.name or name_run(run, config))
    batch, tokens = f"{config.total_batch_size} x {config.seq_len}", count_tokens(config) / 1e6
    say(f"run: {run.out}/{run.name}: {config.num_iterations:,} steps of {batch} tokens, {tokens:,.1f}M in all")
    return run, config


def count_tokens(config):
    """Tokens that a config trains on."""
    return config.num_iterations * config.total_batch_size * config.seq_len


def settle(run, config_class, presets, fields):
    """(run, config): preset, data and number of shards of a Run as set or by the device, and what follows from them."""
    import jax

    device = jax.local_devices()[0]
    topology = run.preflight not in ("", "here")
    preset = run.preset or ("chip" if topology else {"tpu": "chip", "cpu": "laptop"}.get(device.platform, "gpu"))
    require(preset in presets, "preset", preset, f"use one of {', '.join(presets)}")
    config = config_class(**{**presets[preset], **fields})
    data = run.data or ("offline" if preset == "laptop" else "fineweb")
    shards = run.num_shards or min(1000, math.ceil(count_tokens(config) / 50e6))
    because = "as set" if run.preset else f"as the device is a {device.platform}"
    whose = "as set" if run.data else f"as the preset is {preset}"
    say(
        f"device: {jax.local_device_count()} x {device.device_kind} (jax {jax.__version__}, {os.cpu_count()} CPU cores)"
    )
    say(f"preset: {preset}, {because}; data: {data}, {whose}; --help lists all that can be set")
    return dataclasses.replace(run, preset=preset, data=data, num_shards=shards), config
