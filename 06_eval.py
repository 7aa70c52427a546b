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
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onechip/onechip/blob/main/notebooks/06_eval.ipynb)
# # How good is it?
#
# A trained model, asked the questions that others ask theirs: the 22 tasks of CORE, computed as nanochat and DCLM
# compute it to the last example, each accuracy with its standard error, and bits per byte on the same text for your
# model and for anybody's. At the end stands a report that says which differences are more than noise.
#
# | where | what | time | memory |
# |---|---|---|---|
# | laptop, two cores, no network | the newest run in `runs/`, on tasks made by rule | under 2 minutes | under 2 GB |
# | Colab, TPU v6e | 02's default model on all of CORE, 91,000 examples | 2.2 minutes by estimate | under 31.25 GiB |

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
# ## What a question is
#
# A base model answers nothing; it says how likely a text is. So a question of four choices is four texts, and the
# choice whose tokens are likeliest, on average, is the answer. The smallest model that can do it is a table of which
# byte follows which two, counted in a few thousand lines of Python:

# %%
import inspect
import math
import typing
from collections import Counter

import onechip  # noqa: F401  (before jax: it keeps an idle libtpu quiet)
from onechip.machine import prepare, wants_a_look

LOOK = __name__ == "__main__" and wants_a_look()  # the small checks are for a reader: a script with flags skips them


def count_bytes(text):
    """A function of (before, byte) -> its probability after the two bytes `before`, as counted in a text."""
    threes, pairs = (Counter(text[i : i + n] for i in range(len(text))) for n in (3, 2))
    return lambda before, byte: (threes[before + byte] + 0.01) / (pairs[before] + 2.56)


def show_question(question="    def read(self", choices=("):\n", "0):\n", "(:\n", "]\n")):
    """Prints the mean nats per byte of each choice after a question; the lowest is the answer."""
    probability = count_bytes(inspect.getsource(inspect) + inspect.getsource(typing))
    for choice in choices:
        text = question + choice
        places = range(len(question), len(text))
        nats = [-math.log(probability(text[i - 2 : i], text[i])) for i in places]
        print(f"{question + choice!r:<28} {sum(nats) / len(nats):.2f} nats per byte")


if LOOK:
    prepare()
    show_question()
# %% [markdown]
# Everything below does this with a better model, on more questions, and asks how far its own answer can be trusted.
#
# ## Setup
#
# The plumbing is rooms of `onechip/`: `core` renders examples and judges them, `answers` computes losses of many texts
# in few programs, `bundle` fetches CORE's examples, `made_tasks` makes some without a network, `verdicts` knows what an
# accuracy is worth, `foreign` opens other people's models. What is spelled `train.something` is explained in 02.

# %%
import dataclasses
import functools
import importlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from onechip import core, evalreport, verdicts
from onechip.bundle import open_bundle
from onechip.card import add_evaluation, describe_data
from onechip.chat_tasks import CHAT_CORE, ChatTask, chat_core, choice_prompt, conversation
from onechip.chips import CHIPS
from onechip.contamination import example_text, find_contamination
from onechip.conversations import chat_tokens
from onechip.engine import Engine
from onechip.errors import require, say
from onechip.export import copy_into, find_model_files, names_of_files
from onechip.files import read_json_or_none, write_text
from onechip.foreign import SHORT_NAMES, open_foreign
from onechip.generated import CHAT_LABELS, ask_chat, load_chat_tasks, make_writer, why_not
from onechip.hub import upload_folder
from onechip.machine import read_secret
from onechip.made_tasks import make_tasks
from onechip.plots import show_picture
from onechip.questions import EvalTask
from onechip.runfolder import ABOUT, RunFolder, find_checkpoints, newest_run
from onechip.settings import Run, check_fields, parse_settings, pick_preset, setting
from onechip.stages import count_tokens
from onechip.texts import bits_per_byte, first_documents

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is evaluated, on what, and what it is compared with."""

    model: str = setting(
        "", "a run's folder, an export or a Hub repository; gpt2 or hf:NAME for others' models; empty: the newest run"
    )
    tasks: str = setting("", "core, made, chat, or labels of one of them: copa,piqa; empty: as suits the model's data")
    examples: int = setting(0, "examples a task, the first of a seeded shuffle; 0: all", at_least=0)
    bundle: str = setting("", "CORE's examples: a folder or a zip; empty: fetched once a machine")
    data: str = setting("", "what bits per byte are measured on, as 02's --data; empty: the model's own, or offline")
    text_bytes: int = setting(1 << 17, "bytes of text, each of trained and held out", at_least=1000)
    compare: str = setting("", "another evaluation on the same examples: a run's folder or an eval.json")
    search_shards: int = setting(0, "training shards that are searched for the examples; 0: none", at_least=0)
    out: str = setting("runs", "folder of the runs")
    hub_repo: str = setting("", "Hub repository of the exported model; empty: <you>/onechip-<name of the run>")

    def __post_init__(self):
        check_fields(self)


# %% [markdown]
# ## Three kinds of question
#
# CORE has 22 tasks of three kinds. Solved examples may come first, drawn by a seed that is the question's own.
#
# - **multiple choice**: one question, several answers. What differs is scored: the answers' tokens.
# - **schema**: several beginnings, one end. What is equal is scored: the end, given each beginning.
# - **language modelling**: is each token of the answer the likeliest one? No partial credit.
#
# The score of a text is its mean loss a token, and the lowest one wins, the first on ties. That, the shuffles and the
# prompts are nanochat's and DCLM's (Li et al., 2024, arXiv 2406.11794) to the character, so that the numbers compare.

# %%
TOY_TASKS = [
    EvalTask("choice", "multiple_choice", [{"query": "2 + 2 =", "choices": ["5", "4"], "gold": 1}], baseline=0.5),
    EvalTask(
        "schema", "schema",
        [{"context_options": ["A cat", "A stone"], "continuation": "can purr.", "gold": 0}], baseline=0.5,
    ),
    EvalTask("copy", "language_modeling", [{"context": "tick tock tick", "continuation": "tock"}]),
]  # fmt: skip

if LOOK:
    for task in TOY_TASKS:
        print(f"{task.kind}: {core.render(task, task.items[0], [])}")

# %% [markdown]
# The other 91,000 examples come as one zip of about 160 MB from the address that nanochat uses. Its SHA-256 is kept at
# the first download and compared ever after; what is cut, missing or malformed in it is named in a line.
#
# Without a network, tasks are made by rule from held-out documents of the offline corpus: which of four lines comes
# next, which name an attribute has, how a pattern continues. Each has a level of guessing and a ceiling by
# construction.

# %%
if LOOK:
    made = make_tasks(text for _, text in tok.read_documents(tok.offline_corpus().val))
    for task in made:
        print(f"{task.label}: {len(task.items)} of {task.kind}, {task.shots} shots, guessing gives {task.baseline:.2f}")


# %% [markdown]
# A model that was fine-tuned on conversations is asked as one talks to it: `--tasks chat`, ChatCORE's six tasks.
#
# - ARC-Easy, ARC-Challenge and MMLU are answered by a letter, the likeliest of those in the question, right after
#   `<|assistant_start|>`.
# - GSM8K, HumanEval and SpellingBee are answered by a text of at most 512 tokens, greedy, with the calculator at hand.
#   What the model says itself is graded: by the number after `####`, or by running the program in the sandbox. Where
#   this machine has no sandbox, HumanEval is left out, and the report says why.
#
# nanochat dropped SpellingBee in July 2026. The score here is the mean of all six; that of its five is given too.

# %%
if LOOK:
    item = conversation(choice_prompt("What can purr?", "AB", ["A cat", "A stone"]), "A", letters=["A", "B"])
    print(item["messages"][0]["content"])


# %% [markdown]
# ## Whom we ask
#
# A subject is five things: a name, a way to make tokens of text, the token that opens a text, the longest text
# it takes, and a scorer. A run of 02, 04 or 05 has them, and so has GPT-2, which is computed by JAX as well, or any
# causal model that transformers opens. One of ours can also answer in sentences: its engine is built when the first
# answer is due.


# %%
class Asked(NamedTuple):
    """Who is asked.

    encode(texts) -> [ids], without the opening one, whose id is bos; context: tokens it was made for; score: as
    `onechip/core.py` calls it; cropped: whether longer prompts lose their beginning, as GPT-2's do; folder: where its
    report goes; tokenizer: of ours, for conversations; step: of its training; data: the name, revision and so on of
    what it was trained on; facts: {what: figure} for its report; write(prompts, max_tokens) -> [text]: its answers.
    """

    name: str
    encode: Callable
    bos: int
    context: int
    score: Callable
    cropped: bool
    folder: Path
    tokenizer: object = None
    step: int = 0
    data: dict = {}
    facts: dict = {}
    write: Callable | None = None


def is_others(source):
    """Whether a model is another project's: by its short name, by the prefix hf:, or a folder without our settings."""
    about = read_json_or_none(Path(source) / "config.json") or {}
    ours = (Path(source) / ABOUT).exists() or "config" in about
    return source in SHORT_NAMES or source.startswith("hf:") or ("model_type" in about and not ours)


def for_this_device(config, model):
    """The Config with the attention, type and microbatch that the model's preset for this device has."""
    preset = model.presets[pick_preset(Run(), jax.local_devices()[0].platform)[0]]
    fields = {
        name: preset[name] for name in ("attn_impl", "dtype", "device_batch_size", "loss_slice") if name in preset
    }
    rows = fields.get("device_batch_size", config.device_batch_size)
    return dataclasses.replace(config, **fields, total_batch_size=rows, stages="")


ANSWERS_AT_ONCE = 32  # rows of the engine on each device


def make_answering_engine(config, params, tokenizer, model):
    """A function of (prompts: [ids], max_tokens) -> [text]. The engine is built at its first call."""

    @functools.cache
    def writer():
        mesh, decode = train.make_mesh(), functools.partial(tokenizer.decode, skip_special_tokens=False)
        more = {"rows": ANSWERS_AT_ONCE * mesh.size, "mesh": mesh}
        engine = Engine(config, params, model, train.attention_parts(config), **more)
        return make_writer(engine, chat_tokens(tokenizer), decode)

    return lambda prompts, max_tokens: writer()(prompts, max_tokens)


def open_subject(source, out):
    """The Asked that --model names; UserError if it is none."""
    if is_others(source):
        model = open_foreign(source.removeprefix("hf:"))
        folder = Path(out) / ("eval-" + re.sub(r"[^\w.-]+", "-", model.name))
        facts = {"size": "as published", "revision": model.revision or "a folder"}
        return Asked(model.name, model.encode, model.bos, model.context, model.score, True, folder, facts=facts)
    config, params, tokenizer, model = train.open_model(source)
    files = find_model_files(source)
    here = for_this_device(config, model)
    score = train.make_answerer(here, model, train.make_mesh())(params)
    kept = {path: step for step, path in find_checkpoints(files.weights.parent.parent).items()}
    step = kept.get(files.weights.parent, config.num_iterations)
    encode = lambda texts: [ids[1:] for ids in tok.encode_batch(tokenizer, texts)]
    folder = Path(source) if Path(source).is_dir() else Path(out) / ("eval-" + source.replace("/", "-"))
    data, facts = files.about.get("data") or {}, describe_training(config, model, step, files.about)
    write = make_answering_engine(here, params, tokenizer, model)
    bos, more = tok.opening_id(tokenizer), (tokenizer, step, data, facts, write)
    return Asked(folder.name, encode, bos, config.seq_len, score, False, folder, *more)


ASSUMED_MFU = 0.5  # of a v6e, where a run's own speed is not known


def describe_training(config, model, step, about):
    """{what: figure} of a trained model, as text: size, data, tokens, FLOPs, and what they would cost on a v6e."""
    tokens = count_tokens(config, step)
    flops, peak = tokens * train.flops_per_token(config, model), CHIPS["TPU v6 lite"].peak_flops
    return {
        "model": about.get("model", train.GPT.name),
        "size": f"{train.count_params(config, model)['total']:,} parameters",
        "data": describe_data(about.get("data") or {}) or "not known",
        "trained": f"{step:,} of {config.num_iterations:,} steps, {tokens:,} tokens",
        "training FLOPs": f"{flops:.3g}",
        "chip hours": f"{flops / peak / ASSUMED_MFU / 3600:.2g} on a v6e at {ASSUMED_MFU:.0%} MFU, reckoned",
    }


# %% [markdown]
# ## What an accuracy is worth
#
# Of n examples, an accuracy p has a standard error of sqrt(p (1 - p) / n): 0.046 for a coin thrown 120 times. CORE, a
# mean over tasks, gets an interval by drawing the examples again, 10,000 times. Both say how the number would move with
# other examples. Neither says how it moves with another seed of training: seven identical runs of nanochat spread from
# 0.2512 to 0.2677.
#
# Two models are better compared on the same examples, by those that only one of them has right (McNemar's test; for
# CORE, a coin for each such example). `--compare` does that. Below: 1,000 examples, two models with 520 and 540 right.

# %%
if LOOK:
    import numpy as np

    from onechip.questions import Outcome

    toy = lambda right: Outcome("toy", right, 1000, 0.5)
    fewer, more = np.arange(1000) < 520, np.arange(1000) < 540
    for name, other in (("agree on most", more), ("agree by accident", np.roll(more, 480))):
        found = verdicts.compare_task(toy(other), toy(fewer))
        print(f"two models that {name}: +{found.value:.3f}, p = {found.p:.2g}, {found.won} won and {found.lost} lost")


# %% [markdown]
# ## Run
#
# Without flags: the newest run in `runs/`, all questions that suit its data. Each task prints a line as soon as it is
# done; the same command gives the same digits.


# %%
def choose_tasks(settings, corpus):
    """(name of the suite, its EvalTasks, those of them that are asked) by --tasks and --bundle, or by the corpus."""
    made = lambda: make_tasks(text for _, text in tok.read_documents(tok.offline_corpus().val))
    wanted, labels = settings.tasks, settings.tasks.split(",")
    if settings.bundle or wanted == "core":
        suite, tasks = "CORE", open_bundle(settings.bundle)
    elif wanted == "made":
        suite, tasks = "made", made()
    elif wanted == "chat" or set(labels) & set(CHAT_LABELS):
        chosen = [label for label in CHAT_LABELS if wanted == "chat" or label in labels]
        suite, tasks = "ChatCORE", load_chat_tasks(chosen, settings.examples)
    else:
        suite, tasks = train.suite_for(corpus)
    labels = [label for label in labels if label not in ("", "core", "made", "chat")]
    for label in labels:
        known = [task.label for task in tasks]
        require(label in known, "tasks", label, f"use core, made, chat, or labels: {', '.join(known)}")
    return suite, tasks, [task for task in tasks if not labels or task.label in labels]


def as_eval_task(task):
    """A ChatTask without its functions; an EvalTask as it is."""
    return EvalTask(task.label, "chat", task.items) if isinstance(task, ChatTask) else task


def ask_one(subject, task, examples):
    """The Outcome of a task, of either kind."""
    if isinstance(task, ChatTask):
        require(subject.tokenizer, "tasks", "chat", f"{subject.name} was not trained on conversations of ours")
        return ask_chat(task, chat_tokens(subject.tokenizer), subject.score, subject.write, examples)
    cropped = {"max_tokens": subject.context} if subject.cropped else {}
    return core.ask(task, subject.encode, subject.bos, subject.score, examples, **cropped)


def leave_out(asked):
    """(the tasks that this machine can grade, {label: why not} of the others); UserError if none is left."""
    reasons = {task.label: why_not(task) for task in asked if isinstance(task, ChatTask)}
    reasons = {label: reason for label, reason in reasons.items() if reason}
    for label, reason in reasons.items():
        say(f"{label}: left out, as {reason}")
    rest = [task for task in asked if task.label not in reasons]
    require(rest, "tasks", ", ".join(reasons), f"none can be graded here: {'; '.join(reasons.values())}")
    return rest, reasons


def ask_all(subject, tasks, examples):
    """The Outcomes of all tasks, a line each as soon as it is done."""
    outcomes, width = [], max(len(task.label) for task in tasks)
    for task in tasks:
        began = time.monotonic()
        outcome = ask_one(subject, task, examples)
        outcomes.append(outcome)
        error, some = verdicts.standard_error(outcome), len(outcome.correct) < outcome.total
        of = f"the first {len(outcome.correct):,} of {outcome.total:,}" if some else f"all {outcome.total:,}"
        say(f"{task.label:<{width}}  {verdicts.accuracy(outcome):.3f} +- {error:.3f}, guessing {outcome.baseline:.3f}; "
            f"{of}, {time.monotonic() - began:.1f} s")  # fmt: skip
    return outcomes


def measure_bits(subject, corpus, size):
    """{"train_bpb", "val_bpb"} of documents of a training shard and of held-out ones, `size` bytes each."""
    scores = {}
    for name, paths in (("train_bpb", corpus.train[:1]), ("val_bpb", corpus.val)):
        documents = first_documents((text for _, text in tok.read_documents(paths)), size)
        bits = bits_per_byte(documents, subject.encode, subject.bos, subject.score, subject.context)
        scores[name], gzip = bits.per_byte, tok.gzip_bits_per_byte(text.encode() for text in documents)
        of = f"{bits.documents} documents, {bits.size:,} bytes; gzip -9 needs {gzip:.3f}"
        say(f"{name}: {bits.per_byte:.3f} bits per byte of {of}")
    return scores


def corpus_of(subject, data, shards=1):
    """The Corpus that bits per byte are measured on: as set, else the model's own, as text, else the offline one."""
    known = {tok.FINEWEB.name: "fineweb", tok.CLIMBMIX.name: "climbmix", tok.FINEWEB10B.name: "fineweb"}
    return tok.get_corpus(data or known.get(subject.data.get("name"), "offline"), shards, subject.data)


# %%
OVERRIDES = ""  # @param ["", "--tasks core --examples 500", "--model gpt2 --tasks core"] {allow-input: true}

if __name__ == "__main__":
    prepare()
    settings = Settings(**parse_settings(Settings, overrides=OVERRIDES)[0])
    source = settings.model or newest_run(settings.out) or train.train_first(settings.out)
    subject = open_subject(source, settings.out)
    say(f"model: {subject.name}, after {subject.step:,} steps" if subject.step else f"model: {subject.name}")
    corpus = corpus_of(subject, settings.data)
    suite, tasks, asked = choose_tasks(settings, corpus)
    asked, left_out = leave_out(asked)
    limits, who = {"examples": settings.examples}, (subject.name, subject.step, str(subject.folder))
    size = len(CHAT_LABELS) if suite == "ChatCORE" else len(tasks)
    evaluation = verdicts.Evaluation(suite, size, verdicts.hash_tasks(map(as_eval_task, tasks)), *who, limits, [], {})
    other = evalreport.find_evaluation(Path(settings.compare)) if settings.compare else None
    if other:  # before anything takes long
        verdicts.check_same_questions(evaluation, other)
    scores = measure_bits(subject, corpus, settings.text_bytes)
    evaluation = evaluation._replace(outcomes=ask_all(subject, asked, settings.examples), scores=scores)

# %% [markdown]
# ## Look
#
# The table again, with what one number leaves out: the error of each accuracy, what guessing gives, how much of a task
# was run. A score of a subset is called one. `report.md` has the same with the picture, the licences of the data and,
# for CORE, GPT-2's published figures; `eval.json` has each verdict, for `--compare` on another day.
#
# `--search_shards 4` looks whether the examples were in the training text: the share of each task's examples of which
# a long n-gram occurs in four shards of it.


# %%
DATA_LICENCES = {
    tok.FINEWEB.name: "ODC-By 1.0, and Common Crawl's terms of use",
    tok.FINEWEB10B.name: "ODC-By 1.0, and Common Crawl's terms of use",
    tok.CLIMBMIX.name: "see its page on the Hub",
    "stdlib": "PSF licence",
}


def search_training_text(tasks, subject, settings):
    """{label: share of its examples that were found} in training shards of the model's data; None if not asked for."""
    if not settings.search_shards:
        return None
    corpus = corpus_of(subject, settings.data, settings.search_shards)
    texts = {task.label: [example_text(item) for item in task.items] for task in tasks}
    found = find_contamination(texts, (text for _, text in tok.read_documents(corpus.train)))
    return {task.label: task.share for task in found if task.checked.any()}


def chat_facts(outcomes, left_out):
    """{what: figure} of a chat evaluation: nanochat's mean of five, where all were asked, and what was left out."""
    facts = {f"{label}, left out": reason for label, reason in left_out.items()}
    if set(CHAT_CORE) <= {outcome.label for outcome in outcomes}:
        facts["ChatCORE of nanochat's five tasks"] = f"{chat_core(outcomes):.4f}"
    return facts


def report(subject, evaluation, other, found, left_out):
    """Writes report.md, report.png and eval.json into the model's folder, and prints what matters of them."""
    facts = subject.facts | {name: f"{value:.3f} bits per byte" for name, value in evaluation.scores.items()}
    facts |= chat_facts(evaluation.outcomes, left_out)
    evalreport.write_report(subject.folder, evaluation, facts, licences_of(subject), other, found)
    say(evalreport.describe_outcomes(evaluation))
    if other:
        say(evalreport.describe_difference(evaluation, other))
    say(f"left in {subject.folder}: {', '.join(evalreport.FILES)}")
    show_picture(subject.folder / evalreport.PICTURE)


def licences_of(subject):
    """{name: licence} of the data that a subject was trained on, as far as it is known."""
    name = subject.data.get("name")
    return {name: DATA_LICENCES.get(name, "your own")} if name else {}


if __name__ == "__main__":
    found = search_training_text(asked, subject, settings)
    report(subject, evaluation, other, found, left_out)

# %% [markdown]
# ## Save
#
# A model that was exported gets the score, the table and the licences into its card, and the card goes to the Hub if
# there is a token.

# %%
if __name__ == "__main__":
    card = RunFolder(subject.folder).model / "README.md"
    if card.exists():
        block = evalreport.block(evaluation) + "\n\n" + evalreport.licences(evaluation, licences_of(subject))
        write_text(card, add_evaluation(card.read_text(), block))
        copy_into(card.parent, *(subject.folder / name for name in evalreport.FILES))
        name = settings.hub_repo, f"onechip-{subject.name}"
        upload_folder(card.parent, names_of_files(card.parent), read_secret("HF_TOKEN"), *name)
