"""What a laptop's reinforcement learning reaches: pass@1 on held-out sums before and after; a v6e's step, estimated.

    uv run bench/rl.py --model runs/CHAT              # seeds 0, 1, 2 of 08 from one chat
    uv run bench/rl.py --model runs/CHAT --seeds 0    # one of them
    uv run bench/rl.py v6e                            # rollouts and update of depth 12, compiled for the chip

The goal: 15 points of pass@1 in the mean of the seeds, beyond two standard errors, from a start of 15 to 60 %. Seeds
draw other answers; problems and temperature stay. The picture is docs/rl.png with --picture.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from onechip.chips import topology_devices  # noqa: E402
from onechip.errors import UserError, report_in_one_line, say  # noqa: E402
from onechip.files import read_json_lines  # noqa: E402
from onechip.ring import empty_rings  # noqa: E402
from onechip.weights import bytes_of, cast_weights, weight_shapes  # noqa: E402

V6E_BYTES_A_SECOND, V6E_FLOPS = 1.64e12, 918e12  # as published
GOAL = 0.15


def improve(model, seed, out, words):
    """(pass@1 before, after, seconds by the clock, the run's folder) of one seed; UserError if the command fails."""
    began, name = time.monotonic(), f"rl-seed-{seed}"
    command = [sys.executable, str(ROOT / "08_rl.py"), "--model", model, "--seed", str(seed), "--out", out]
    done = subprocess.run([*command, "--name", name, *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"08_rl.py has failed: {done.stderr.strip()[-500:]}")
    found = [re.search(rf"^{when}: pass@1 ([0-9.]+)", done.stdout, re.MULTILINE) for when in ("before", "after")]
    if not all(found):
        raise UserError(f"no line says what was reached: {done.stdout[-300:]}")
    before, after = (float(match[1]) for match in found)
    return before, after, time.monotonic() - began, Path(out) / name


def summarize(results):
    """Prints the mean gain with its standard error; whether the goal is reached."""
    gains = [after - before for before, after, *_ in results]
    mean, error = statistics.mean(gains), 0.0
    if len(gains) > 1:
        error = statistics.stdev(gains) / len(gains) ** 0.5
    say(f"pass@1 rises by {mean:.3f} +- {error:.3f}, mean and standard error of {len(gains)} seeds")
    return mean - 2 * error >= 0 and mean >= GOAL and all(0.15 <= before <= 0.6 for before, *_ in results)


def draw_picture(results, path):
    """Writes a PNG: the reward of each step's answers, and pass@1 before and after, of each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for i, (before, after, _, folder) in enumerate(results):
        rows = [row for row in read_json_lines(folder / "metrics.jsonl") if "rollouts/reward" in row]
        steps, color = [row["step"] for row in rows], f"C{i}"
        axes.plot(steps, [row["rollouts/reward"] for row in rows], color=color, alpha=0.35, linewidth=0.8)
        axes.plot([0, steps[-1]], [before, after], "o--", color=color, label=f"seed {i}: {before:.3f} to {after:.3f}")
    axes.set(xlabel="step", ylabel="share of right answers", ylim=(0, 1.02), title="pass@1 on held-out sums (dots)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def estimate_v6e(depth=12, answers=256, prompt=256, new=256):
    """{phase: seconds} of a step on a v6e: rollouts by bounds of HBM and FLOPs, the update by its compiler."""
    train, rl = (importlib.import_module(name) for name in ("02_train", "08_rl"))
    model, optimizer = train.model_named("nanochat"), train.optimizer_named("muon")
    base = train.config_with(model.config, optimizer.settings)(
        **{**train.presets_of(model, optimizer)["chip"], "depth": depth}
    )
    fields = rl.rewarded_fields(base, model, optimizer, "chip")
    limits = rl.AnswerLimits(prompt, new)
    config = dataclasses.replace(base, **{**fields, "total_batch_size": answers})
    table, length = model.weights(config), prompt + new
    shapes = jax.eval_shape(functools.partial(cast_weights, table, dtype=config.dtype), weight_shapes(config, table))
    weights = bytes_of({name: part for name, part in shapes.items() if "embed" not in name and name != "wte"})
    rings = bytes_of(jax.eval_shape(functools.partial(empty_rings, config, answers, length)))
    short = dataclasses.replace(config, seq_len=rl.batch_width(config, limits))
    forward = train.flops_per_token(short, model) / 3
    decode = new * max((weights + rings * 0.75) / V6E_BYTES_A_SECOND, answers * forward / V6E_FLOPS)
    read = answers * prompt * forward / (0.5 * V6E_FLOPS)
    loss, arrays = functools.partial(rl.rollout_loss, rl.Policy()), rl.arrays_of(rl.Policy())
    fit = train.preflight(short, "v6e:1x1", model, optimizer=optimizer, loss=loss, batch=arrays)
    device = topology_devices("v6e:1x1")[0]
    peaks = [rl.peak_bytes(c, device.platform) for c in rl.compile_rollouts(config, model, limits, answers, device)]
    return {
        "rollouts: prompts, at half of the peak FLOP/s": round(read, 3),
        "rollouts: new tokens, bound by HBM": round(decode, 3),
        "update, by the compiler's estimate": fit.step_seconds and round(fit.step_seconds, 3),
        "GiB of rollouts without the training's state": round(max(peaks) / 2**30, 2),
        "GiB of the update": round(fit.peak_bytes / 2**30, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("seeds", "v6e"), default="seeds")
    parser.add_argument("--model", default="", help="the chat to improve")
    parser.add_argument("--out", default="runs", help="folder for the runs")
    parser.add_argument("--seeds", default="0 1 2")
    parser.add_argument("--picture", default="", help="where to write the picture")
    parser.add_argument("--words", default="", help="more settings of 08")
    asked = parser.parse_args()
    if asked.what == "v6e":
        return print(json.dumps(estimate_v6e(), indent=2))
    results = []
    for seed in map(int, asked.seeds.split()):
        results.append(improve(asked.model, seed, asked.out, asked.words.split()))
        before, after, seconds, _ = results[-1]
        say(f"seed {seed}: pass@1 {before:.3f} before, {after:.3f} after, {seconds:.0f} s by the clock")
    reached = summarize(results)
    if asked.picture:
        draw_picture(results, asked.picture)
    say(f"the goal is {'reached' if reached else 'not reached'}")
    return 0 if reached else 1


if __name__ == "__main__":
    report_in_one_line()
    sys.exit(main())
