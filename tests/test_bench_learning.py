"""bench/learning.py: which scores count, their errors, the table, and that its variants are what they are called."""

import importlib.util
import json
import math
import sys

import jax
import pytest
from conftest import ROOT

from onechip.errors import UserError


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_learning", ROOT / "bench" / "learning.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def score(variant, seed, bpb, step=300, **more):
    return {"variant": variant, "depth": 4, "steps": 300, "seed": seed, "step": step, "bpb": bpb, **more}


def test_the_table_takes_differences_seed_by_seed(bench):
    """Only last steps of that size and length; the error is of the differences, which share what a seed did."""
    rows = [score("recipe", seed, bpb) for seed, bpb in ((1, 1.80), (2, 1.90), (3, 2.00))]
    rows += [score("no-smear", seed, bpb) for seed, bpb in ((1, 1.81), (2, 1.92), (3, 2.03), (9, 5.0))]
    rows += [score("no-smear", 1, 7.0, step=100), {**score("no-smear", 1, 8.0), "depth": 3}]
    assert bench.final_scores(rows, 4, 300)["no-smear"] == {1: 1.81, 2: 1.92, 3: 2.03, 9: 5.0}
    heads, recipe, line = bench.show(rows, 4, 300).splitlines()
    assert "bits per byte" in heads and recipe.split()[:4] == ["recipe", "1.9000", "+-", f"{0.1 / 3**0.5:.4f}"]
    assert f"0.0200 +- {0.01 / 3**0.5:.4f}" in line and " 4 " in line and line.endswith("no smear")


def test_equal_time_pays_for_a_slower_step(bench):
    """A step twice as long leaves half of the steps: log 2 of SLOPE more."""
    rows = [score("recipe", 1, 1.8), score("no-smear", 1, 1.7)]
    rows += [{"variant": "recipe", "ms": 100.0, "gib": 1}, {"variant": "no-smear", "ms": 200.0, "gib": 1}]
    line = next(line for line in bench.show(rows, 4, 300).splitlines() if line.startswith("no-smear"))
    assert f"{-0.1 + bench.SLOPE * math.log(2):+.4f}" in line and " 200 " in line


def test_every_variant_is_a_config_and_leaves_out_what_it_says(bench):
    """At the laptop's size each is one; without value embeddings there is no array of them, with AdamW no Muon."""
    for name, variant in bench.VARIANTS.items():
        config = bench.config_of(variant, 2, 10, 7, {})
        assert (config.num_iterations, config.param_seed, config.n_layer) == (10, 7, 2), name
    names = {}
    for name in ("recipe", "no-value-embeds", "no-smear", "no-backout", "no-lambdas"):
        variant = bench.VARIANTS[name]
        tree = variant.model.weights(bench.config_of(variant, 2, 10, 7, {}))
        names[name] = {jax.tree_util.keystr(path[-1:]) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    gone = {name: {part.strip("[']") for part in names["recipe"] - found} for name, found in names.items()}
    assert gone == {
        "recipe": set(),
        "no-value-embeds": {"value_embeds", "value_gate"},
        "no-smear": {"smear_gate", "smear_lambda"},
        "no-backout": {"backout_lambda"},
        "no-lambdas": {"resid_lambdas", "x0_lambdas"},
    }
    assert bench.VARIANTS["adamw"].optimizer is bench.train.ADAMW and bench.VARIANTS["02-muon"].model is bench.train.GPT
    assert bench.config_of(bench.VARIANTS["best-fit"], 4, 10, 7, {}).packing == "best-fit"


def test_what_is_there_is_not_trained_again(bench, tmp_path, monkeypatch, capsys):
    """A second run of the same variant and seed reads its score; an unknown variant is refused with all names."""
    out, trained = tmp_path / "scores.jsonl", []

    def learn(variant, config, *rest):
        trained.append(config.param_seed)
        yield {"step": config.num_iterations, "bpb": 2.0 + config.param_seed, "seconds": 0.0}

    monkeypatch.setattr(bench, "learn", learn)
    monkeypatch.setattr(bench.tok, "get_corpus", lambda *args: None)  # neither is needed to train nothing
    monkeypatch.setattr(bench.tok, "get_tokenizer", lambda *args: None)
    command = ["learning.py", "recipe", "--depth", "2", "--steps", "7", "--out", str(out), "--seeds"]
    for seeds in (["1"], ["1", "2"]):
        monkeypatch.setattr(sys, "argv", [*command, *seeds])
        bench.main()
    assert trained == [1, 2] and [json.loads(line)["bpb"] for line in out.read_text().splitlines()] == [3.0, 4.0]
    assert out.with_suffix(".png").exists() and "3.5000 +- 0.5000" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["learning.py", "recipee"])
    with pytest.raises(UserError, match="variant='recipee': use recipe, 02"):
        bench.parse()
