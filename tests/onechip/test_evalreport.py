"""What an evaluation says of itself: report.md, the picture, the card, and whether one is better than another."""

import matplotlib.image
import numpy as np
import pytest

from onechip import evalreport, verdicts
from onechip.card import add_evaluation
from onechip.errors import UserError
from onechip.evalfile import load_evaluation
from onechip.questions import Outcome
from onechip.verdicts import Evaluation

LABELS = ("hellaswag", "copa", "squad", "piqa", "boolq")
TOTALS, RUN, BASELINES = (400, 100, 300, 200, 250), (200, 100, 150, 200, 120), (0.25, 0.5, 0.0, 0.5, 0.62)


def evaluation(shift=0.0, model="mine", suite="CORE", run=RUN, step=300):
    """An evaluation of five tasks; one of a greater shift has right whatever one of a smaller has, and more."""
    outcomes = []
    for i, (label, total, n, baseline) in enumerate(zip(LABELS, TOTALS, run, BASELINES, strict=True)):
        drawn = np.random.default_rng(i).random(n)
        outcomes.append(Outcome(label, drawn < 0.3 + 0.1 * i + shift, total, baseline, 1.0 - 0.01 * i))
    limits = {"examples": max(run)}
    return Evaluation(suite, len(LABELS), "ab" * 32, model, step, f"runs/{model}", limits, outcomes, {"val_bpb": 0.9})


def test_a_report_says_what_was_run_and_how_good_it_is(tmp_path):
    """Facts, a row for each task with its counts, accuracy, error and chance, GPT-2's figures, licences, the picture;
    and eval.json, which reads back as the same evaluation."""
    mine = evaluation()
    text = evalreport.write_report(
        tmp_path, mine, {"size": "7 parameters"}, {"fineweb-edu": "ODC-By"}, found={"copa": 0.25}
    )
    assert text == (tmp_path / "report.md").read_text() and "| size | 7 parameters |" in text
    for outcome in mine.outcomes:
        [row, *_] = [line for line in text.splitlines() if line.startswith(f"| {outcome.label} |")]
        n = len(outcome.correct)
        shown = f"all {n}" if n == outcome.total else f"first {n} of {outcome.total}"
        p = outcome.correct.mean()
        assert row.split(" | ")[1:4] == [shown, f"{p:.3f}", f"{np.sqrt(p * (1 - p) / n):.3f}"]
    assert "CORE, of a subset: " in text and "# CORE\n" not in text, "a number from a subset is called so"
    assert "0.2565" in text and "| lambada_openai |" not in text
    assert "| copa | 25.0% |" in text and "| squad | CC BY-SA 4.0 |" in text and "| fineweb-edu | ODC-By |" in text
    read = load_evaluation(tmp_path / "eval.json")
    assert read._replace(outcomes=[]) == mine._replace(outcomes=[])
    for a, b in zip(read.outcomes, mine.outcomes, strict=True):
        np.testing.assert_array_equal(a.correct, b.correct)


def test_a_whole_core_is_called_core(tmp_path):
    """With all examples of all tasks it is CORE, and another suite never is; nor is it put next to GPT-2."""
    assert evalreport.name_of_score(evaluation(run=TOTALS)) == "CORE"
    made = evaluation(suite="made", run=TOTALS)
    assert evalreport.name_of_score(made) == "mean of the made tasks"
    assert "GPT-2" not in evalreport.write_report(tmp_path, made, {}, {})


def test_is_it_better(tmp_path):
    """The report answers in words, for a clear gain, a clear loss and noise, with the figures behind it."""
    base = evaluation(0.0, "old")
    gained = evalreport.write_report(tmp_path, evaluation(0.06), {}, {}, other=base)
    values = [f"{verdicts.core(e.outcomes):.4f}" for e in (evaluation(0.06), base)]
    assert f"## Is {values[0]} better than {values[1]}?" in gained and "\nYes. mine has" in gained
    assert "No, it is worse. " in evalreport.describe_difference(base, evaluation(0.06))
    noise = evalreport.describe_difference(evaluation(0.002), base)
    assert noise.startswith("These examples do not tell the two apart. mine has")
    assert "old after 300 steps (runs/old)" in evalreport.describe_difference(evaluation(0.06, "old", step=9), base)


def test_other_questions_are_not_compared():
    """Another bundle or limit is refused before anything is asked, by the field's name."""
    for field, value in (("bundle", "cd" * 32), ("limits", {"examples": 3}), ("suite", "made")):
        with pytest.raises(UserError, match=f"^{field}="):
            verdicts.check_same_questions(evaluation(), evaluation()._replace(**{field: value}))


def test_where_a_comparison_is_found(tmp_path):
    """In a run's folder or by its own name; a folder without one is named."""
    evalreport.write_report(tmp_path / "run", evaluation(), {}, {})
    for place in (tmp_path / "run", tmp_path / "run" / "eval.json"):
        assert evalreport.find_evaluation(place).model == "mine"
    with pytest.raises(UserError, match="^compare=.*has no eval.json"):
        evalreport.find_evaluation(tmp_path)


def test_the_picture_has_a_bar_for_each_task(tmp_path):
    """Wider bars are better tasks; two evaluations have two bars each; many tasks make it higher."""
    sizes = []
    for name, other in (("one", None), ("two", evaluation(0.1, "other"))):
        evalreport.draw_report(tmp_path / f"{name}.png", evaluation(), other)
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")
        blue = np.all(np.abs(picture[..., :3] - [0.298, 0.571, 0.764]) < 0.06, axis=-1)  # tab:blue at 0.8 on white
        sizes.append(blue.sum())
        assert blue.any(axis=1).sum() > 50
    assert sizes[1] < 0.7 * sizes[0], "half as high next to another"


def test_a_card_has_the_evaluation_once():
    """Before the lines that load the model, replaced by the next one; a card of other origin stays as it is."""
    card = "# name\n\ntable\n\n## Load it and sample\n\nlines\n"
    once = add_evaluation(card, "first")
    assert once == "# name\n\ntable\n\n## How good it is\n\nfirst\n\n## Load it and sample\n\nlines\n"
    assert add_evaluation(once, "second") == once.replace("first", "second")
    assert add_evaluation("# another's\n", "x") == "# another's\n"
