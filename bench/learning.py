"""How fast a model learns: variants of 05's recipe on the offline corpus, as bits per byte with errors over seeds.

    uv run bench/learning.py                                   05's recipe and 02, 300 steps, three seeds
    uv run bench/learning.py recipe no-smear --seeds 1 2 3     named variants; --list says what there is
    uv run bench/learning.py --depth 3 --steps 1200 recipe     another size or length
    uv run bench/learning.py recipe --name mine --set matrix_lr=0.03    any field of the Config
    uv run bench/learning.py recipe --steps 375 --name staged --set 'stages="150:4x256"'    tokens of 300
    uv run bench/learning.py --v6e recipe no-smear             estimated time of a v6e step at depth 12, compiled
    uv run bench/learning.py --show                            only the tables and the picture of what is in --out

Depth 4 is the laptop preset: 256 channels, steps of 8 x 256 tokens. All variants see the same batches and are scored on
the same held-out rows as 02 and 05; a seed draws other first weights. Each score is appended to --out as a JSON line,
and a run that is in there is not repeated. An error is the standard error of the mean; a difference is taken seed by
seed, against the recipe. `at equal time` adds what the compiler's estimate of a v6e step costs: a variant whose step
takes r times as long could make 1 / r of the steps, and bits per byte fall by SLOPE for each factor of e in steps.
"""

import argparse
import collections
import dataclasses
import functools
import importlib
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
train = importlib.import_module("02_train")
speedrun = importlib.import_module("05_speedrun")
tok = train.tok

import jax
import jax.numpy as jnp
from matplotlib import pyplot

from onechip.chips import GIB, topology_devices
from onechip.doors import config_with
from onechip.errors import report_in_one_line, require, say
from onechip.fit import measure
from onechip.machine import prepare
from onechip.tables import table


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a variant is: settings on top of the laptop preset, an optimizer, a model."""

    about: str
    fields: dict = dataclasses.field(default_factory=dict)
    optimizer: train.Optimizer = speedrun.MUON
    model: train.Model = speedrun.NANOCHAT


def stack_shapes(config, weights):
    """{(in, out): how many} of Muon's matrices."""
    return collections.Counter(
        speedrun.matrix_shape(config, w) for w in jax.tree.leaves(weights) if speedrun.is_muons(w)
    )


def soap_init(config, weights, params):
    """Muon's state, and for each stack the shorter side's second moment, its eigenbasis, and Adam's second moment."""
    bases = {}
    for shape, count in stack_shapes(config, weights).items():
        side, other = min(shape), max(shape)
        eye = jnp.broadcast_to(jnp.eye(side), (count, side, side))
        bases[f"{shape[0]}x{shape[1]}"] = {"L": 0 * eye, "Q": eye, "V": jnp.zeros((count, side, other))}
    return speedrun.muon_init(config, weights, params) | {"bases": bases}


def soap(config, G, U, bases, step, decay=0.95, every=1):
    """SOAP (Vyas et al., 2024, arXiv 2409.11321) on the shorter side: Adam in the eigenbasis of the gradients."""
    flip = G.shape[1] > G.shape[2]
    G, U = (G.mT, U.mT) if flip else (G, U)
    L = decay * bases["L"] + (1 - decay) * G @ G.mT
    Q = jnp.linalg.qr(L @ bases["Q"])[0]  # a step of subspace iteration from the last basis
    turned = Q.mT @ G
    V = decay * bases["V"] + (1 - decay) * turned * turned
    U = Q @ ((Q.mT @ U) / (jnp.sqrt(V / (1 - decay ** (step + 1.0))) + 1e-8))
    return U.mT if flip else U, {"L": L, "Q": Q, "V": V}


SOAP = speedrun.MUON._replace(init=soap_init, update=functools.partial(speedrun.muon_update, precondition=soap))


def without(*parts):
    """05's Muon without some of its parts."""
    return speedrun.MUON._replace(update=functools.partial(speedrun.muon_update, without=parts))


VARIANTS = {
    "recipe": Variant("05 as it is"),
    "02": Variant("02: its model, AdamW at its default rate", {}, train.ADAMW, train.GPT),
    "02-6e-3": Variant("02 at the best of its rates", {"learning_rate": 6e-3}, train.ADAMW, train.GPT),
    "02-muon": Variant("02's model with Muon", {}, speedrun.MUON, train.GPT),
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
    "warmdown-0.85-to-0": Variant(
        "warm-down over 85 % of the run, to 0", {"warmdown_ratio": 0.85, "final_lr_frac": 0.0}
    ),
    "bfloat16-embeds": Variant("embeddings and their moments stored in bfloat16", {"embed_dtype": "bfloat16"}),
    "best-fit": Variant("rows that begin with a document", {"packing": "best-fit"}),
    "soap": Variant("SOAP on the shorter side before Muon", optimizer=SOAP),
    "warmup-10": Variant("10 steps of warm-up", {"warmup_steps": 10}),
    "x1": Variant("rates as the dial has them", {"learning_rate": 1.0}),
    "x4": Variant("rates times 4", {"learning_rate": 4.0}),
    "x2": Variant("rates times 2", {"learning_rate": 2.0}),
    "x12": Variant("rates times 12", {"learning_rate": 12.0}),
    "x6": Variant("rates times 6", {"learning_rate": 6.0}),
}


SLOPE = 0.287  # bits per byte a factor of e in steps, between 300 and 1,200 steps of the recipe (LOG.md)


def config_of(variant, depth, steps, seed, more):
    """A variant's Config at laptop scale; more: fields on top."""
    size = {"n_head": depth} if variant.model is train.GPT else {"depth": depth}
    fields = train.presets_of(variant.model, variant.optimizer)["laptop"] | size | variant.fields | more
    config_class = config_with(variant.model.config, variant.optimizer.settings)
    return config_class(**fields | {"num_iterations": steps, "param_seed": seed})


def learn(variant, config, corpus, tokenizer, every, decays=()):
    """Trains a variant; yields {"step", "bpb", "seconds"} after every `every` steps and after the last.

    decays: of running averages of the weights over the whole run, which are scored at the end: {"average": decay, ...}.
    """
    mesh = train.make_mesh()
    task = train.pretraining(config, corpus, tokenizer)
    state = train.init_state(config, mesh, variant.model, variant.optimizer)
    step = train.make_steps(config, mesh, variant.model, variant.optimizer, task)
    score, start = task.score(config, variant.model, mesh), time.perf_counter()
    averages = {decay: jax.tree.map(jnp.copy, state["params"]) for decay in decays}
    blend = jax.jit(lambda a, p, d: jax.tree.map(lambda a, p: d * a + (1 - d) * p, a, p), donate_argnums=0)
    row = lambda params: {"bpb": score(params)["val_bpb"], "seconds": time.perf_counter() - start}
    for i, (batch, _) in zip(range(1, config.num_iterations + 1), task.batches(None), strict=False):
        state, _ = step(state, batch)
        averages = {decay: blend(average, state["params"], decay) for decay, average in averages.items()}
        if i % every == 0 or i == config.num_iterations:
            yield {"step": i, **row(state["params"])}
    yield from ({"step": i, "average": decay, **row(average)} for decay, average in averages.items())


def estimate(variant, more):
    """{"ms", "gib"}: a variant's step at depth 12 (02: 12 layers of 768 channels) as the v6e compiler estimates it."""
    mesh = train.make_mesh(topology_devices("v6e:1x1"))
    config_class = config_with(variant.model.config, variant.optimizer.settings)
    is_gpt = variant.model is train.GPT
    size = {"n_head": 6, "total_batch_size": 256} if is_gpt else {"depth": 12}
    rates = {"learning_rate": 1.0} if "learning_rate" in variant.fields else {}
    config = config_class(**size | variant.fields | rates | more)
    fit = measure(train.workload(mesh, variant.model, variant.optimizer), config)
    return {"ms": 1e3 * fit.step_seconds, "gib": fit.peak_bytes / GIB}


def read_rows(path):
    """All rows of a file of results, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def final_scores(rows, depth, steps):
    """{variant: {seed: bits per byte after the last step}}."""
    found = collections.defaultdict(dict)
    for row in rows:
        if "bpb" in row and (row["depth"], row["steps"], row["step"]) == (depth, steps, steps):
            found[row["variant"]][row["seed"]] = row["bpb"]
    return found


def mean_and_error(values):
    """Mean and its standard error, as text; one value has no error."""
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    return f"{statistics.mean(values):.4f} +- {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def show(rows, depth, steps):
    """The table of one size and length, best first."""
    scores, base = final_scores(rows, depth, steps), final_scores(rows, depth, steps)["recipe"]
    ms = {row["variant"]: row["ms"] for row in rows if "ms" in row}
    lines = []
    for name, by_seed in sorted(scores.items(), key=lambda item: statistics.mean(item[1].values())):
        differences = [score - base[seed] for seed, score in by_seed.items() if seed in base]
        at_equal_time = ""
        if {name, "recipe"} <= set(ms) and differences:
            at_equal_time = f"{statistics.mean(differences) + SLOPE * math.log(ms[name] / ms['recipe']):+.4f}"
        about = VARIANTS[name].about if name in VARIANTS else ""
        cells = [mean_and_error(list(by_seed.values())), mean_and_error(differences), f"{len(by_seed)}"]
        lines.append([name, *cells, f"{ms[name]:.0f}" if name in ms else "", at_equal_time, about])
    heads = [f"depth {depth}, {steps} steps", "bits per byte", "difference", "seeds", "v6e ms", "at equal time", ""]
    return table(lines, heads, "<20 >17 >17 >5 >6 >13 <0")


def draw(rows, path):
    """A picture of all learning curves: bits per byte by step, the mean over seeds."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    curves = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        if "bpb" in row:
            curves[row["variant"], row["depth"], row["steps"]][row["step"]].append(row["bpb"])
    for (name, depth, steps), curve in sorted(curves.items()):
        points = sorted(curve)
        means = [statistics.mean(curve[step]) for step in points]
        axes.plot(points, means, marker="o", label=f"{name}, depth {depth}, {steps} steps")
    axes.set(xlabel="steps of 2,048 tokens", ylabel="bits per byte, held out", xscale="log")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def parse():
    """The command line; UserError for a variant that is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=["recipe", "02"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--every", type=int, default=100, help="steps between scores")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--name", default="", help="what to call a variant with --set")
    parser.add_argument("--out", type=Path, default=Path("runs/learning.jsonl"))
    parser.add_argument("--average", type=float, nargs="*", default=[], help="decays of running averages to score too")
    for flag in ("list", "show", "v6e"):
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args()
    unknown = [name for name in args.variants if name not in VARIANTS]
    require(not unknown, "variant", " ".join(unknown), f"use {', '.join(VARIANTS)}")
    require(not args.set or (args.name and len(args.variants) == 1), "--set", args.set, "give one variant and a --name")
    return args


def run(args, more):
    """Yields the rows of all runs that were asked for and are not there yet."""
    corpus, wanted = tok.get_corpus("offline", 0), itertools.product(args.seeds, args.variants)
    for seed, name in wanted:
        label = args.name or name
        if seed in final_scores(read_rows(args.out), args.depth, args.steps)[label]:
            continue
        config = config_of(VARIANTS[name], args.depth, args.steps, seed, more)
        tokenizer = tok.get_tokenizer(corpus, config.vocab_size)
        for row in learn(VARIANTS[name], config, corpus, tokenizer, args.every, args.average):
            named = f"{label}-average-{row['average']}" if "average" in row else label
            say(f"{named}, seed {seed}: step {row['step']}: {row['bpb']:.4f} bits per byte, {row['seconds']:.0f} s")
            yield {"variant": named, "depth": args.depth, "steps": args.steps, "seed": seed, **row, "set": more}


def main():
    args = parse()
    if args.list:
        print(table([[name, variant.about] for name, variant in VARIANTS.items()]))
        return
    prepare()
    more = {name: json.loads(value) for name, value in (pair.split("=") for pair in args.set)}
    rows = run(args, more)
    if args.v6e:
        rows = ({"variant": args.name or name, **estimate(VARIANTS[name], more)} for name in args.variants)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for row in [] if args.show else rows:
        if args.v6e:
            say(f"{row['variant']}: {row['ms']:.1f} ms a step of 2^19 tokens, {row['gib']:.2f} GiB, estimated")
        with args.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
    known = read_rows(args.out)
    for depth, steps in sorted({(row["depth"], row["steps"]) for row in known if "bpb" in row}):
        print(show(known, depth, steps), end="\n\n")
    if any("bpb" in row for row in known):
        draw(known, args.out.with_suffix(".png"))


if __name__ == "__main__":
    report_in_one_line()
    main()
