"""An evaluation in words and in a picture: report.md, report.png, and the block that goes into a model card."""

from onechip import verdicts
from onechip.errors import require
from onechip.evalfile import load_evaluation, save_evaluation
from onechip.files import atomic_write, write_text
from onechip.tables import table

FILES = REPORT, PICTURE, EVALUATION = "report.md", "report.png", "eval.json"
# Of GPT-2 (karpathy/nanochat, dev/estimate_gpt3_core.ipynb): CORE, and accuracies in percent.
GPT2_SIZES = ("124M", "355M", "774M", "1558M")
GPT2_CORE = (0.1139, 0.1849, 0.2146, 0.2565)
GPT2_TASKS = {
    "hellaswag_zeroshot": (30.9, 39.0, 44.0, 50.2),
    "hellaswag": (30.8, 39.5, 44.4, 51.2),
    "lambada_openai": (32.3, 42.6, 48.8, 52.3),
    "piqa": (62.3, 67.0, 69.8, 72.5),
    "arc_easy": (41.2, 48.0, 53.5, 59.5),
    "arc_challenge": (22.2, 26.2, 26.4, 29.9),
}
# As the data sets' pages on the Hub or their repositories state them.
LICENCES = {
    "hellaswag_zeroshot": "MIT",
    "jeopardy": "not stated by its publisher",
    "bigbench_qa_wikidata": "Apache-2.0",
    "arc_easy": "CC BY-SA 4.0",
    "arc_challenge": "CC BY-SA 4.0",
    "copa": "BSD-2-Clause",
    "commonsense_qa": "MIT",
    "piqa": "AFL-3.0",
    "openbook_qa": "Apache-2.0",
    "lambada_openai": "CC BY 4.0",
    "hellaswag": "MIT",
    "winograd": "CC BY 4.0",
    "winogrande": "CC BY",
    "bigbench_dyck_languages": "Apache-2.0",
    "agi_eval_lsat_ar": "MIT; the exam's questions are LSAC's",
    "bigbench_cs_algorithms": "Apache-2.0",
    "bigbench_operators": "Apache-2.0",
    "bigbench_repeat_copy_logic": "Apache-2.0",
    "squad": "CC BY-SA 4.0",
    "coqa": "several: CC BY-SA 4.0, MSR-LA and others by passage",
    "boolq": "CC BY-SA 3.0",
    "bigbench_language_identification": "Apache-2.0",
    "ARC-Easy": "CC BY-SA 4.0",
    "ARC-Challenge": "CC BY-SA 4.0",
    "MMLU": "MIT",
    "GSM8K": "MIT",
    "HumanEval": "MIT",
}
SEEDS = (
    "What the interval leaves out is the seed of training: seven identical runs of nanochat at depth 24 spread from "
    "0.2512 to 0.2677."
)


# ----------------------------------------------------------------------------------------------------------------------
# In words


def describe_count(outcome):
    """How many of a task's examples were run: "all 500", or "first 100 of 500"."""
    run = len(outcome.correct)
    return f"all {run:,}" if run == outcome.total else f"first {run:,} of {outcome.total:,}"


def task_rows(outcomes):
    """Rows of the table of tasks: task, examples, accuracy, standard error, guessing, ceiling, centred."""
    return [
        [
            outcome.label,
            describe_count(outcome),
            f"{verdicts.accuracy(outcome):.3f}",
            f"{verdicts.standard_error(outcome):.3f}",
            f"{outcome.baseline:.3f}",
            f"{outcome.ceiling:.3f}",
            f"{verdicts.centred(outcome):+.3f}",
        ]
        for outcome in outcomes
    ]


TASK_HEADS = ["task", "examples", "accuracy", "+-", "guessing", "ceiling", "centred"]


def name_of_score(evaluation):
    """What the mean of an evaluation's centred accuracies may be called."""
    name = "CORE" if evaluation.suite == "CORE" else f"mean of the {evaluation.suite} tasks"
    return name if evaluation.complete else f"{name}, of a subset"


def describe_mean(evaluation):
    """The mean of centred accuracies with its interval, in words."""
    low, high = verdicts.core_interval(evaluation.outcomes)
    value = verdicts.core(evaluation.outcomes)
    return f"{name_of_score(evaluation)}: {value:.4f}, 95 % interval {low:.4f} to {high:.4f}"


def describe_outcomes(evaluation):
    """The table of tasks, and the score below it, as text."""
    return f"{table(task_rows(evaluation.outcomes), TASK_HEADS, '<8 <8 >8')}\n{describe_mean(evaluation)}"


def describe_difference(mine, other):
    """Whether one evaluation is better than another, in a few sentences."""
    found = verdicts.compare_core(mine, other)
    values, (low, high) = [verdicts.core(evaluation.outcomes) for evaluation in (mine, other)], found.interval
    better = "Yes." if found.value > 0 else "No, it is worse."
    answer = better if found.clear else "These examples do not tell the two apart."
    return (
        f"{answer} {mine.model} has {values[0]:.4f} and {name_apart(mine, other)} has {values[1]:.4f} on the same "
        f"examples: a difference of {found.value:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}, p = {found.p:.2g}. "
        f"{found.won:,} examples only the first has right, {found.lost:,} only the second."
    )


def name_apart(mine, other):
    """The name of the model of `other`, with more where both have the same."""
    return other.model if other.model != mine.model else f"{other.model} after {other.step:,} steps ({other.source})"


def markdown(rows, heads):
    """Rows of text as a Markdown table, the first column to the left and the others to the right."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def block(evaluation):
    """Score and table as Markdown, the same in the report and in a model card."""
    lines = [f"**{describe_mean(evaluation)}.** {SEEDS if evaluation.suite == 'CORE' else ''}".strip(), ""]
    lines.append(markdown(task_rows(evaluation.outcomes), TASK_HEADS))
    lines.append("")
    lines.append(
        "+-: standard error, binomial. guessing: accuracy of chance; ceiling: the best that can be reached; centred: "
        "(accuracy - guessing) / (1 - guessing), of which the score is the plain mean."
    )
    return "\n".join(lines)


def published(evaluation):
    """Published figures of GPT-2 next to an evaluation of CORE, as Markdown."""
    found = {outcome.label: f"{100 * verdicts.accuracy(outcome):.1f}" for outcome in evaluation.outcomes}
    rows = [[label, found[label], *map(str, values)] for label, values in GPT2_TASKS.items() if label in found]
    name = "CORE" if evaluation.complete else "CORE, of a subset"
    rows.insert(0, [name, f"{verdicts.core(evaluation.outcomes):.4f}", *map(str, GPT2_CORE)])
    return markdown(rows, ["", evaluation.model, *(f"GPT-2 {size}" for size in GPT2_SIZES)])


def comparison(mine, other):
    """The section that compares two evaluations: a sentence, and a table of the tasks."""
    others, rows = {outcome.label: outcome for outcome in other.outcomes}, []
    for outcome in mine.outcomes:
        found = verdicts.compare_task(outcome, others[outcome.label])
        low, high = found.interval
        share = f"{low:+.3f} to {high:+.3f}"
        rows.append([outcome.label, f"{found.value:+.3f}", share, f"{found.p:.2g}", found.won, found.lost])
    values = [verdicts.core(evaluation.outcomes) for evaluation in (mine, other)]
    return "\n".join(
        [
            f"## Is {values[0]:.4f} better than {values[1]:.4f}?",
            "",
            describe_difference(mine, other),
            "",
            markdown(rows, ["task", "difference", "95 %", "p (McNemar)", "only the first", "only the second"]),
            "",
            f"If nothing differed, about {len(rows) * verdicts.LEVEL:.1f} of {len(rows)} tasks would have a p below "
            f"{verdicts.LEVEL:g} all the same.",
        ]
    )


def licences(evaluation, data):
    """A table of the licences of tasks and training data; data: {name: licence} of the latter."""
    asked = {outcome.label for outcome in evaluation.outcomes}
    rows = [[label, licence] for label, licence in LICENCES.items() if label in asked]
    rows += [[label, "made by rule from the offline corpus: PSF"] for label in sorted(asked - LICENCES.keys())]
    return markdown(rows + [list(item) for item in data.items()], ["data", "licence"])


def write_report(folder, evaluation, facts, data, other=None, found=None):
    """Writes eval.json, report.md and report.png into a folder; returns the text of report.md.

    facts: {what: figure} of the model, as text; data: {name: licence} of what it was trained on; other: an Evaluation
    to compare it with; found: {label: share of its examples found in the training text}, or None if nobody looked.
    """
    parts = [f"# How good is {evaluation.model}?", "", markdown(facts.items(), ["", evaluation.model]), ""]
    parts += [f"![Accuracy of each task]({PICTURE})", "", f"## {name_of_score(evaluation)}", "", block(evaluation), ""]
    if evaluation.suite == "CORE":
        parts += ["## Next to GPT-2", "", published(evaluation), ""]
    if other:
        parts += [comparison(evaluation, other), ""]
    if found is not None:
        rows = [[label, f"{share:.1%}"] for label, share in found.items()]
        parts += ["## In the training text", "", SEARCHED, "", markdown(rows, ["task", "examples"]), ""]
    parts += ["## Licences", "", licences(evaluation, data)]
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(parts) + "\n"
    save_evaluation(folder / EVALUATION, evaluation)
    draw_report(folder / PICTURE, evaluation, other)
    write_text(folder / REPORT, text)
    return text


SEARCHED = (
    "The share of each task's examples of which a long n-gram occurs in the training shards that were searched. Such a "
    "model may know the answer from there."
)


def find_evaluation(place):
    """The Evaluation of a run's folder or an eval.json; UserError if there is none."""
    path = place / EVALUATION if place.is_dir() else place
    require(path.exists(), "compare", str(place), f"has no {EVALUATION}: evaluate that model first")
    return load_evaluation(path)


# ----------------------------------------------------------------------------------------------------------------------
# In a picture


def draw_report(path, evaluation, other=None):
    """Writes a PNG: a bar for each task's accuracy with its 95 % error, a mark where guessing is, one at the ceiling;
    if there is an `other` evaluation of the same tasks, a second bar."""
    from matplotlib.figure import Figure  # here, because importing it looks for fonts

    outcomes = evaluation.outcomes[::-1]  # the first on top
    drawn = [(evaluation.model, outcomes, "tab:blue")]
    if other:
        others = {outcome.label: outcome for outcome in other.outcomes}
        drawn.append((other.model, [others[outcome.label] for outcome in outcomes], "tab:gray"))
    figure = Figure(figsize=(8, 1.6 + 0.34 * len(outcomes)), layout="constrained")
    axes, height = figure.subplots(), 0.7 / len(drawn)
    for i, (name, rows, color) in enumerate(drawn):
        places = [j + 0.35 - (i + 0.5) * height for j in range(len(rows))]
        error = {"elinewidth": 1, "capsize": 2, "ecolor": "black"}
        widths, errors = map(verdicts.accuracy, rows), [1.96 * verdicts.standard_error(row) for row in rows]
        axes.barh(places, list(widths), height, xerr=errors, color=color, alpha=0.8, label=name, error_kw=error)
    marks = {"marker": "|", "linestyle": "", "markersize": 12, "markeredgewidth": 2}
    axes.plot([row.baseline for row in outcomes], range(len(outcomes)), color="tab:red", label="guessing", **marks)
    if any(row.ceiling < 1 for row in outcomes):
        axes.plot([row.ceiling for row in outcomes], range(len(outcomes)), color="tab:green", label="ceiling", **marks)
    labels = [f"{row.label}, {describe_count(row)}" for row in outcomes]
    axes.set_yticks(range(len(outcomes)), labels, fontsize=8)
    axes.set(xlim=(0, 1), xlabel="accuracy, with 95 % of what other examples would give")
    axes.set_title(f"{evaluation.model}: {describe_mean(evaluation)}", fontsize=9, loc="right")
    axes.grid(axis="x", alpha=0.3)
    axes.set_ylim(-0.6, len(outcomes) - 0.4)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=120)
