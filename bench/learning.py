"""How fast a model learns: variants of 05's recipe on the offline corpus, with seeds, as bits per byte with error bars.

    uv run bench/learning.py                                     the recipe and 02, 300 steps, three seeds: 20 minutes
    uv run bench/learning.py recipe no-smear --seeds 1 2 3       named variants; --list prints all with what they are
    uv run bench/learning.py --depth 6 --steps 1200 ...          another size or length
    uv run bench/learning.py --only-show                         the table and picture of what is in the file
    uv run bench/learning.py --v6e recipe no-smear               estimated ms of a v6e step at depth 12, compiled

All variants see the same batches and are scored on the same held-out rows, those of 02 and 05; a seed draws other first
weights. Every run is appended to --out as JSON lines as soon as it is scored, and is not repeated when it is there.
An error is the standard error of the mean over seeds; a difference is taken seed by seed against the first variant.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
train = importlib.import_module("02_train")
speedrun = importlib.import_module("05_speedrun")
tok = train.tok

import jax

from onechip.doors import config_with
from onechip.machine import prepare
from onechip.tables import table


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a variant is: settings on top of the laptop preset, an optimizer, a model."""

    about: str
    fields: dict = dataclasses.field(default_factory=dict)
    optimizer: train.Optimizer = speedrun.MUON
    model: train.Model = speedrun.NANOCHAT
    task: Callable = train.pretraining


def without(*parts):
    """05's Muon without some of its parts."""
    return speedrun.MUON._replace(update=functools.partial(speedrun.muon_update, without=parts))


VARIANTS = {
    "recipe": Variant("05 as it is"),
    "02": Variant("02: its model, AdamW at its default rate", {}, train.ADAMW, train.GPT),
    "02-6e-3": Variant("02 at the best of its rates", {"learning_rate": 6e-3}, train.ADAMW, train.GPT),
    "02-muon": Variant("02's model with Muon", {"learning_rate": 4.0}, speedrun.MUON, train.GPT),
    "adamw": Variant("05's model, all by AdamW", {"learning_rate": 6e-3}, train.ADAMW),
    "no-value-embeds": Variant("no value embeddings", {"value_embeds": False}),
    "no-smear": Variant("no smear", {"smear": False}),
    "no-backout": Variant("no backout", {"backout": False}),
    "no-lambdas": Variant("no weights of stream and embedding", {"lambdas": False}),
    "no-qk-scale": Variant("queries and keys times 1", {"qk_scale": 1.0}),
    "no-fc-init": Variant("c_fc starts like the others", {"fc_init": 1.0}),
    "no-windows": Variant("every layer sees the whole context", {"window_pattern": "L"}),
    "no-nesterov": Variant("Muon without Nesterov", optimizer=without("nesterov")),
    "no-equilibrate": Variant("Muon without equilibration", optimizer=without("equilibrate")),
    "no-renormalize": Variant("Muon without renormalization", optimizer=without("renormalize")),
    "no-per-neuron": Variant("Muon without NorMuon's second moment", optimizer=without("per_neuron")),
    "no-cautious": Variant("decay everywhere", optimizer=without("cautious")),
    "no-shape": Variant("one rate for wide and tall matrices", optimizer=without("shape")),
    "no-decay": Variant("no weight decay of matrices", {"weight_decay": 0.0}),
    "no-warmup": Variant("no warm-up", {"warmup_steps": 1}),
    "momentum-0.95": Variant("momentum 0.95 throughout", {"momentum_start": 0.95, "beta1": 0.95, "momentum_end": 0.95}),
    "warmdown-0.5": Variant("warm-down over half of the run", {"warmdown_ratio": 0.5}),
    "to-0": Variant("warm-down to 0", {"final_lr_frac": 0.0}),
    "warmdown-0.85-to-0": Variant("warm-down over 85 % of the run, to 0", {"warmdown_ratio": 0.85, "final_lr_frac": 0.0}),
    "exclusive": Variant("attention without the token's own value", {"exclusive": True}),
    "pairs": Variant("a hashed embedding of token pairs", {"pairs": 5}),
    "x1": Variant("rates as the dial has them", {"learning_rate": 1.0}),
    "x2": Variant("rates times 2", {"learning_rate": 2.0}),
    "x6": Variant("rates times 6", {"learning_rate": 6.0}),
    "x8": Variant("rates times 8", {"learning_rate": 8.0}),
}


def config_of(variant, depth, steps, seed, more):
    """A variant's Config at laptop scale; more: fields on top."""
    presets = variant.model.presets
    fields = presets["laptop"] | variant.optimizer.presets.get("laptop", {})
    fields |= {"n_head": depth} if variant.model is train.GPT else {"depth": depth}
    fields |= {"num_iterations": steps, "param_seed": seed} | variant.fields | more
    return config_with(variant.model.config, variant.optimizer.settings)(**fields)


def learn(variant, config, corpus, tokenizer, every):
    """Trains a variant; yields {"step", "bpb", "loss", "seconds"} after every `every` steps and at the end."""
    mesh = train.make_mesh()
    task = variant.task(config, corpus, tokenizer)
    state = train.init_state(config, mesh, variant.model, variant.optimizer)
    step = train.make_train_step(config, mesh, variant.model, variant.optimizer, task.loss)
    score = task.score(config, variant.model, mesh)
    start = time.perf_counter()
    for i, (batch, _) in zip(range(1, config.num_iterations + 1), task.batches(None), strict=False):
        state, metrics = step(state, batch)
        if i % every == 0 or i == config.num_iterations:
            loss = float(metrics["loss"])
            params = variant.optimizer.result(config, state["params"], state["opt"]) if hasattr(variant.optimizer, "result") else state["params"]
            yield {"step": i, "bpb": score(params)["val_bpb"], "loss": loss, "seconds": time.perf_counter() - start}


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def final_scores(rows, depth, steps):
    """{variant: {seed: bits per byte after the last step}}."""
    found = {}
    for row in rows:
        if (row["depth"], row["steps"], row["step"]) == (depth, steps, steps):
            found.setdefault(row["variant"], {})[row["seed"]] = row["bpb"]
    return found


def mean_and_error(values):
    """Mean and its standard error, as text."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} +- {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def show(rows, depth, steps):
    """The table of final scores, the first variant being what others are compared with."""
    scores = final_scores(rows, depth, steps)
    if not scores:
        return f"no finished run of depth {depth} and {steps} steps"
    base = scores.get("recipe") or next(iter(scores.values()))
    lines = []
    for name, by_seed in sorted(scores.items(), key=lambda item: statistics.mean(item[1].values())):
        shared = [by_seed[seed] - base[seed] for seed in by_seed if seed in base]
        lines.append([name, mean_and_error(list(by_seed.values())), mean_and_error(shared) if shared else "",
                      str(len(by_seed)), VARIANTS[name].about if name in VARIANTS else ""])  # fmt: skip
    return table(lines, [f"depth {depth}, {steps} steps", "bits per byte", "against recipe", "seeds", ""], "<20 >17 >18 >5 <0")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=["recipe", "02"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--name", default="", help="of a variant with --set")
    parser.add_argument("--out", type=Path, default=Path("runs/learning.jsonl"))
    parser.add_argument("--only-show", action="store_true")
    args = parser.parse_args()
    prepare()
    more = {k: json.loads(v) for k, v in (pair.split("=") for pair in args.set)}
    corpus = tok.get_corpus("offline", 0)
    for seed in args.seeds:
        for name in [] if args.only_show else args.variants:
            label = args.name or name
            if seed in final_scores(read_rows(args.out), args.depth, args.steps).get(label, {}):
                continue
            variant = VARIANTS[name]
            config = config_of(variant, args.depth, args.steps, seed, more)
            tokenizer = tok.get_tokenizer(corpus, config.vocab_size)
            for row in learn(variant, config, corpus, tokenizer, args.every):
                row = {"variant": label, "depth": args.depth, "steps": args.steps, "seed": seed, **row, "set": more}
                print(f"{label} seed {seed}: step {row['step']}: {row['bpb']:.4f} ({row['seconds']:.0f} s)", flush=True)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")
    print(show(read_rows(args.out), args.depth, args.steps))


if __name__ == "__main__":
    main()
