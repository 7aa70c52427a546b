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
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/onechip/onechip/blob/main/notebooks/07_chat.ipynb)
# # Talk to it
#
# A model that 02, 04 or 05 trained continues a text. Here it learns to answer: a second, short training on
# conversations, in which only the answers count, and a calculator that it calls by writing to it. Then you talk to it:
# below a cell, in a terminal, on a page, or through OpenAI's API.
#
# | where | what | steps |
# |---|---|---|
# | laptop, no network | the newest run in `runs/`, on conversations made by rule | 300, about 5 minutes |
# | Colab, TPU v6e | SmolTalk, MMLU, GSM8K, spelling: 1.1M conversations | about 930, of 2^19 tokens; not timed |
#
# A laptop's model of 05 then has 98 % of held-out sums and counted letters right, by calling the calculator, and spells
# two of three words that it has never seen.

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
# ## What a conversation is
#
# One text with special tokens in it. The model is trained to say what is its own to say: the answer, the call of a
# tool, the end. What the user says and what the tool returns is given to it. Below, what is learned is in brackets.

# %%
import onechip  # noqa: F401  (before jax: it keeps an idle libtpu quiet)
from onechip.calculator import calculate
from onechip.conversations import ChatTokens, render_conversation
from onechip.machine import prepare, wants_a_look

LOOK = __name__ == "__main__" and wants_a_look()  # the small checks are for a reader: a script with flags skips them


def show_mask(messages):
    """Prints a conversation, its words in place of token ids, with what is learned of it in brackets."""
    spelled = ChatTokens(*(f"<|{name}|>" for name in ChatTokens._fields[:-1]), encode=str.split)
    words = zip(*render_conversation(spelled, messages), strict=True)
    print(" ".join(f"[{word}]" if learned else word for word, learned in words))


if LOOK:
    prepare()
    called = [{"type": "python", "text": "12 * 34"}, {"type": "python_output", "text": calculate("12 * 34")}]
    said = [*called, {"type": "text", "text": "It is 408."}]
    show_mask([{"role": "user", "content": "What is 12 * 34?"}, {"role": "assistant", "content": said}])

# %% [markdown]
# ## Setup
#
# Plumbing is in rooms of `onechip/`: `conversations` has the layout and the chat template, `lessons` makes questions by
# rule, `chat_sets` gets those of the Hub, `mixture` packs them into rows, `warmstart` begins a run with another run's
# state. What is spelled `train.something` is explained in 02.

# %%
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from onechip.answer import TextRequest
from onechip.card import describe_result
from onechip.chat_sets import HUB_SETS, SPELLING_SETS, hub_source, spelling_source
from onechip.chatbox import chat_in_cell, serve_in_notebook
from onechip.conversations import assistant_parts, chat_tokens, render_prompt
from onechip.doors import SweepChoice, SweepTask, Task, config_with
from onechip.engine import Engine
from onechip.errors import in_notebook, require, say
from onechip.export import find_model_files, names_of_files
from onechip.files import hash_file
from onechip.hosts import gathered, host_count, is_first, on_this_host
from onechip.hub import upload_folder
from onechip.lessons import (
    CALCULATOR,
    counting,
    docstring_pairs,
    docstrings,
    lesson_messages,
    repeating,
    spelling,
    split_words,
)
from onechip.machine import read_secret
from onechip.mesh import build_mesh
from onechip.mixture import Mixture, TalkSource, check_place, masked_batch, packed_conversations, parse_mixture
from onechip.own_conversations import read_conversations
from onechip.parts import array_files
from onechip.questions import Outcome
from onechip.runfolder import OPT, TOKENIZER, newest_run
from onechip.settings import Run, choose, parse_settings, peek, setting
from onechip.spelling import read_words
from onechip.talker import TalkSettings
from onechip.talking import TOOLS, TalkDesk, check_talk, talk
from onechip.tools import ToolRunner
from onechip.verdicts import accuracy, standard_error
from onechip.warmstart import count_steps_before, has_moments, load_start

tok = importlib.import_module("01_tokenizer")
train = importlib.import_module("02_train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRun(Run):
    """What to fine-tune, on which conversations, and where to leave it."""

    model: str = setting("", "a run's folder, an export or a Hub repository; empty: the newest run that is no chat")
    data: str = setting(
        "", "offline: made by rule; hub: downloaded; empty: as suits the preset", choices=("", "offline", "hub")
    )
    mixture: str = setting("", "sources and how many of each, 'smoltalk:460000 gsm8k:30000'; empty: by the data")
    conversations: str = setting("", "a JSONL file of your own, a conversation a line; its name in a mixture is own")
    questions: int = setting(300, "held-out questions of each kind, before and after", at_least=1)
    talk: bool = setting(False, "talk to it in this terminal; fine-tunes only if there is no chat yet")
    serve: bool = setting(False, "serve a page to chat on, and OpenAI's API; fine-tunes only if there is no chat yet")
    address: str = setting("127.0.0.1", "where --serve listens; any other than loopback asks for a key")
    port: int = setting(8000, "and its port; 0: any free one", at_least=0, at_most=65535)
    key_file: str = setting("", "file with the key that clients must send; empty: ONECHIP_API_KEY, where it is set")
    origins: str = setting("", "other websites' pages that may use it, http://localhost:3000, with blanks between")
    names: str = setting("", "more names that it is reached by, chat.example.org, with blanks between")
    tools: str = setting(
        "calculator", "what its calls run in: none, calculator, or python in a sandbox", choices=tuple(TOOLS)
    )
    places: int = setting(8, "answers that are written at once", at_least=1)
    temperature: float = setting(0.6, "how freely answers are chosen; 0: always the likeliest token", at_least=0)
    top_k: int = setting(50, "of so many likeliest tokens; 0: of all", at_least=0)
    int8: bool = setting(False, "weights in 8 bits: half the bytes a token")
    draft: str = setting("", "speculative decoding: copy, or a smaller model's run; empty: none")


# %% [markdown]
# ## Lessons
#
# Where there is no network, conversations are made by rule. Four kinds can be checked:
#
# - **calculator**: copy two numbers into a call, then say what came out;
# - **counting** letters: the same with a word, `"strawberry".count("r")`;
# - **spelling**: a model sees tokens, not letters, so it has to learn what each token is made of;
# - **repeating** what was said: nothing else, and the first two need it most.
#
# What is asked at the end has never been shown. Numbers are split by a hash, and so are words, among those whose tokens
# several words share: nothing else says how a token is spelled. A fifth kind is what functions of Python's standard
# library are for, from their docstrings: that is for talking, and no rule can grade it.

# %%
DOCUMENTS_READ = 400  # of the offline corpus, for docstrings


def make_lessons(encode):
    """[Lesson] of the offline mixture; encode(text) -> ids, of the tokenizer that the model has."""
    corpus, words = tok.offline_corpus(), split_words(read_words(), encode)
    texts = lambda paths: (text for _, text in itertools.islice(tok.read_documents(paths), DOCUMENTS_READ))
    shown, asked = docstring_pairs(texts(corpus.train)), docstring_pairs(texts(corpus.val))
    known = dict(shown)
    asked = [pair for pair in asked if pair[0] not in known]
    return [CALCULATOR, counting(words), spelling(words), repeating(words), docstrings(shown, asked)]


# %%
if LOOK:
    small = tok.train_tokenizer((text for _, text in tok.read_documents(tok.offline_corpus().val)), 2_000)
    lessons = make_lessons(chat_tokens(small).encode)
    for lesson in lessons:
        show_mask(lesson_messages(lesson, 1))

# %% [markdown]
# ## Mixture
#
# A mixture is a list of sources, each with a count: so many of it in an epoch, all in one seeded order. With a network
# it is nanochat's: SmolTalk once, MMLU's auxiliary questions three times, GSM8K four times, and two spelling tasks.
#
# Who is it? That is yours to say: `--conversations FILE`, a JSONL file with a conversation in each line,
# `{"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Ada."}]}`. Each is
# taken twice an epoch, or as `own:500` in `--mixture` says.

# %%
MIXTURES = {
    "offline": "calculator:7000 counting:7000 spelling:12000 repeating:7000 docstrings:1000",
    "hub": "smoltalk:460000 mmlu:300000 gsm8k:30000 simple-spelling:200000 spelling-bee:80000 calculator:20000",
}
LESSONS = ("calculator", "counting", "spelling", "repeating", "docstrings")
# Tokens of a conversation, about, of a vocabulary of 32,768: an epoch's steps follow from them before any is here.
TOKENS_EACH = {"smoltalk": 900, "mmlu": 160, "gsm8k": 220, "spelling-bee": 130, "own": 100}
OTHER_TOKENS = 40
SOURCES = (*HUB_SETS, *SPELLING_SETS, *LESSONS, "own")


def choose_counts(mixture, data, own):
    """{source: conversations an epoch} of --mixture, or of the data's own; own: conversations in the user's file."""
    counts = parse_mixture(mixture or MIXTURES[data], SOURCES)
    require("own" not in counts or own, "mixture", mixture, "own needs a file: --conversations FILE")
    return counts if "own" in counts or not own else counts | {"own": 2 * len(own)}


def count_steps(counts, batch_tokens):
    """Steps of one epoch, at least one, by the usual length of a conversation of each source."""
    tokens = sum(count * TOKENS_EACH.get(name, OTHER_TOKENS) for name, count in counts.items())
    return max(1, -(-tokens // batch_tokens))


def open_sources(counts, encode, own):
    """([TalkSource] of a mixture, {name: commits of what was downloaded})."""
    sources, commits = [], {}
    lessons = {lesson.name: lesson for lesson in make_lessons(encode)} if set(counts) & set(LESSONS) else {}
    for name in counts:
        if name in HUB_SETS:
            source, commits[name] = hub_source(name)
        elif name in SPELLING_SETS:
            source = spelling_source(name)
        elif name == "own":
            source = TalkSource(name, lambda number: own[number % len(own)])
        else:
            make = functools.partial(lesson_messages, lessons[name])
            source = TalkSource(name, make, functools.partial(make, held_out=True))
        sources.append(source)
    return sources, commits, lessons


# %%
if LOOK:
    for name, text in MIXTURES.items():
        counts = parse_mixture(text, SOURCES)
        print(f"{name}: {sum(counts.values()):,} conversations, {count_steps(counts, 1 << 19):,} steps of 2^19 tokens")

# %% [markdown]
# ## A batch
#
# A row takes whole conversations, always the longest of a hundred waiting ones that still fits, and is padded when none
# does: nothing is cut in two. A mask says which targets count. The loss is the mean over those of the whole batch,
# whichever microbatch or device they are in, so that a short answer is worth as much as its tokens wherever it lies.
#
# The mask is easily lost, and nothing crashes: nanochat trained for weeks on the users' words as well, and ChatCORE was
# 0.315 where it is 0.355 with the mask. A test here trains with and without, and sees the score fall.


# %%
def chat_batches(config, mixture, tokens, position=None):
    """(batch with a mask, position after it) without end; UserError, at once, for what cannot be a position."""
    check_place(position)
    rows = packed_conversations(mixture, tokens, config.total_batch_size, config.seq_len + 1, position)
    return ((masked_batch(ids, mask), after) for ids, mask, after in rows)


# %%
if LOOK:
    toy_tokens = chat_tokens(small)
    toy_sources = [TalkSource(lesson.name, functools.partial(lesson_messages, lesson)) for lesson in lessons]
    toy_mixture = Mixture(toy_sources, dict.fromkeys(LESSONS, 100))
    ids, mask, place = next(packed_conversations(toy_mixture, toy_tokens, 8, 257))
    begun, share = (ids == toy_tokens.user_start).sum(axis=1), place["log"]["padding"]
    print(
        f"conversations a row: {begun.tolist()}; {mask.mean():.0%} of the tokens are learned, {share:.0%} are padding"
    )

# %% [markdown]
# ## Asking
#
# All questions are asked at once, by the engine (`onechip/engine.py`): it reads a prompt in one pass and writes one
# token a step for each of 64 texts; one that has ended makes room for the next question. Where an answer closes a call,
# the calculator's output is put behind it as if the model had written that too.


# %%
ANSWERED_AT_ONCE, ANSWER_AT_MOST, LONGEST_QUESTION = 64, 56, 512


def make_answering(config, model, tokenizer, mesh=None):
    """A function of (params, [messages that end with the user's]) -> [parts of the answer], likeliest token by token.

    Each row has room for LONGEST_QUESTION tokens at most, ANSWER_AT_MOST of them the answer's. Between two calls
    nothing of it is on the devices of `mesh` (default: all of this host) but its programs.
    """
    tokens, decode = chat_tokens(tokenizer), functools.partial(tokenizer.decode, skip_special_tokens=False)
    mesh = mesh if mesh and host_count() == 1 else build_mesh(jax.local_devices())
    length = min(config.seq_len, LONGEST_QUESTION)
    room, rows = min(ANSWER_AT_MOST, length // 2), -(-ANSWERED_AT_ONCE // mesh.size) * mesh.size
    tool, engines, ends = ToolRunner(tokens, decode, calculate), [], (tokens.assistant_end, tokens.bos)
    asking = {"max_new_tokens": room, "stop": ends, "pause": tool.pause, "hook": tool.hook}

    def answer(params, conversations):
        params = on_this_host(gathered(params))
        if engines:
            engines[0].load(params)
        else:
            parts = train.attention_parts(config)
            engines.append(Engine(config, params, model, parts, rows=rows, length=length, mesh=mesh))
        prompts = (render_prompt(tokens, messages, length - room - 1) for messages in conversations)
        answers = engines[0].generate_all([TextRequest(tokens=ids, **asking) for ids in prompts])
        engines[0].free()
        return [assistant_parts(tokens, answer.tokens, decode) for answer in answers]

    return answer


def spell_parts(parts):
    """An answer as text, a call as [code -> output]."""
    shown = {"text": "{}", "python": "[{}", "python_output": " -> {}] "}
    return "".join(shown[part["type"]].format(part["text"]) for part in parts)


def ask_lessons(answer, params, lessons, count):
    """[Outcome] of held-out questions of those Lessons that a rule can grade, `count` of each."""
    outcomes = []
    for lesson in (lesson for lesson in lessons if lesson.is_right):
        items = [lesson_messages(lesson, number, held_out=True) for number in range(count)]
        answers = answer(params, [messages[:-1] for messages in items])
        right = [lesson.is_right(m[-1]["content"], parts) for m, parts in zip(items, answers, strict=True)]
        outcomes.append(Outcome(lesson.name, np.array(right, bool), count, 0.0))
    return outcomes


# %%
if LOOK:
    toy = train.Config(
        n_head=2, head_dim=16, aspect_ratio=16, vocab_size=2_000, seq_len=128, attn_impl="einsum", dtype="float32",
        device_batch_size=2, total_batch_size=2,
    )  # fmt: skip
    untrained = train.init_params(toy, jax.random.key(0))
    for outcome in ask_lessons(make_answering(toy, train.GPT, small), untrained, lessons, 5):
        print(f"{outcome.label}: an untrained model has {outcome.correct.sum()} of {outcome.total} right")

# %% [markdown]
# ## The task
#
# Fine-tuning is a `Task` of 02's loop: batches with a mask, 02's loss, and a score, the loss of the answers in held-out
# conversations, in nats a supervised token. So it resumes to the last bit, is checked before it starts, saves, mirrors
# and shows itself as pretraining does. Accuracies on held-out questions are its `ask`, every `eval_core_every` steps.


# %%
def hold_out(config, sources, counts, tokens):
    """tok.HeldOut of about eval_tokens tokens of held-out conversations; targets that do not count are -1."""
    rows = max(1, config.eval_tokens // config.seq_len)
    mixture = Mixture(sources, counts, held_out=True)
    ids, mask, _ = next(packed_conversations(mixture, tokens, rows, config.seq_len + 1))
    batch = masked_batch(ids, mask)
    return tok.HeldOut(batch["x"], np.where(batch["mask"], batch["y"], -1), None)


def lesson_figures(lessons, tokenizer, config, model, mesh):
    """A function of params -> {"tasks/chat": mean accuracy, "tasks/<lesson>": accuracy}, for Task.ask."""
    answer = make_answering(config, model, tokenizer, mesh)

    def figures(params):
        outcomes = ask_lessons(answer, params, lessons, config.eval_core_examples or 300)
        values = {f"tasks/{outcome.label}": accuracy(outcome) for outcome in outcomes}
        return {"tasks/chat": float(np.mean(list(values.values()))), **values}

    return figures


def talk_data(counts, origin):
    """{"name", "revision"} of the conversations of a mixture; origin: JSON that says what else they are made from."""
    made_from = json.dumps([counts, origin], sort_keys=True)
    return {"name": "conversations", "revision": hashlib.sha256(made_from.encode()).hexdigest()[:20]}


def fine_tuning(config, sources, counts, tokenizer, lessons=(), origin=None):
    """The Task of learning the answers in a mixture; origin: JSON that says what else the data are made from."""
    train.check_vocabulary(config, tokenizer)
    tokens, lengths = chat_tokens(tokenizer), tok.token_byte_lengths(tokenizer)
    mixture, held_out = Mixture(sources, counts), hold_out(config, sources, counts, tokens)
    return Task(
        batches=functools.partial(chat_batches, config, mixture, tokens),
        loss=train.cross_entropy,
        score=lambda config, model, mesh: train.make_evaluator(config, model, mesh, held_out, lengths),
        ask=functools.partial(lesson_figures, lessons, tokenizer) if lessons else None,
        origin={"data": talk_data(counts, origin), "tokenizer_sha256": tok.tokenizer_hash(tokenizer)},
        facts={"mixture": counts, "made_from": origin},
        files={TOKENIZER: tokenizer.to_str(pretty=True).encode()},
        arrays=("x", "y", "mask"),
    )


# %% [markdown]
# ## Run
#
# The newest run in `runs/` is taken, or 05's laptop model trained first. Its settings stay, but for those below.
# Rates are 0.8 of pretraining's without warm-up, and fall over the last half; with Muon they do not follow the batch.
# On a laptop they stay what they were. `weight_decay` is 0. The optimizer is pretraining's, with the moments that it
# ended with, if the run still has them.
#
# - `--model runs/NAME` fine-tunes another model; `--conversations me.jsonl` tells it who it is;
# - `--data hub` takes nanochat's mixture, downloaded.


# %%
TUNED = {
    "stages": "", "packing": "stream", "warmup_steps": 0, "warmup_ratio": 0.0, "warmdown_ratio": 0.5,
    "final_lr_frac": 0.0, "weight_decay": 0.0, "sample_every": 0, "eval_core_every": 0, "save_every": 0,
}  # fmt: skip
MUON_TUNED = {"momentum_start": 0.85, "momentum_warmup": 300, "beta1": 0.95, "momentum_end": 0.95}
LAPTOP_TUNED = {"num_iterations": 300, "eval_every": 150, "eval_tokens": 1 << 14}
DEVICE_FIELDS = ("attn_impl", "dtype", "device_batch_size", "loss_slice")
REFERENCE_BATCH = 2**19  # tokens of a batch at which Muon's rates are what they are called


def tuned_fields(base, model, optimizer, preset, counts):
    """{field: value} of fine-tuning a model whose Config is `base` with an Optimizer, on the device of a preset."""
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)} | TUNED
    own = model.presets[preset]
    fields |= {name: own[name] for name in DEVICE_FIELDS if name in own}
    if base.total_batch_size % fields["device_batch_size"]:
        fields["device_batch_size"] = 1
    batch_tokens = base.total_batch_size * base.seq_len
    fields |= {"num_iterations": count_steps(counts, batch_tokens), "learning_rate": 0.8 * base.learning_rate}
    if optimizer.settings is not None:  # Muon: its own settings, and rates that are named for a larger batch
        fields |= MUON_TUNED | {"learning_rate": 0.8 * (REFERENCE_BATCH / batch_tokens) ** 0.5}
    return fields | (LAPTOP_TUNED | {"learning_rate": base.learning_rate} if preset == "laptop" else {})


def is_chat(about):
    """Whether a config.json is that of a fine-tuned model, be it by conversations or by rewards."""
    return (about.get("data") or {}).get("name") in ("conversations", "rollouts")


def choose_base(overrides):
    """(ModelFiles, Model, Optimizer, its Config) of the model to fine-tune, trained first if there is none."""
    out = peek("out", overrides) or Run().out
    source = peek("model", overrides) or newest_run(out, lambda about: not is_chat(about))
    source = source or train.train_first(out, train.model_named("nanochat"), train.optimizer_named("muon"))
    return train.open_base(source, peek("optimizer", overrides))


def find_chat(overrides):
    """The ModelFiles of the chat that --talk and --serve open, --model or the newest; None if one is fine-tuned now."""
    if not {peek(name, overrides).lower() for name in ("talk", "serve")} & {"true", "yes", "1"}:
        return None
    source = peek("model", overrides) or newest_run(peek("out", overrides) or Run().out, is_chat)
    files = find_model_files(source) if source else None
    return files if files and is_chat(files.about) else None


def choose_chat(files, model, optimizer, base, overrides=""):
    """(ChatRun, config, {source: count}, the user's conversations) with nothing left open."""
    path = peek("conversations", overrides)
    own = read_conversations(path) if path else []
    data, mixture = peek("data", overrides), peek("mixture", overrides)
    presets, counts_of = chat_presets(files, model, optimizer, base, data, mixture, own)

    def name(run, config):
        settings = json.dumps([run.data, run.mixture, own, dataclasses.asdict(config)], sort_keys=True)
        return f"chat-{Path(files.source).name}-{hashlib.sha256(settings.encode()).hexdigest()[:6]}"

    run, config = choose(config_with(model.config, optimizer.settings), presets, overrides, ChatRun, name)
    return run, config, counts_of[run.preset], own


def chat_presets(files, model, optimizer, base, asked, mixture, own):
    """({preset: fields of fine-tuning}, {preset: {source: count}}); asked: what the user set as the data."""
    config_class = config_with(model.config, optimizer.settings)
    known = {field.name for field in dataclasses.fields(config_class)}
    presets, counts_of = {}, {}
    for preset in model.presets:
        data = asked or ("offline" if preset == "laptop" else "hub")
        require(data in MIXTURES, "data", data, f"use {' or '.join(MIXTURES)}")
        counts_of[preset] = choose_counts(mixture, data, own)
        fields = tuned_fields(base, model, optimizer, preset, counts_of[preset])
        fields["steps_before"] = count_steps_before(files, optimizer)
        presets[preset] = {name: value for name, value in fields.items() if name in known} | {"data": data}
    return presets, counts_of


def hash_base(files):
    """[SHA-256, hex] of the files with a model's weights."""
    return list(map(hash_file, array_files(files.weights)))


def hash_moments(files, optimizer):
    """[SHA-256, hex] of the files with the moments that a run begins with; none where there are none."""
    return list(map(hash_file, array_files(files.weights.parent / OPT))) if has_moments(files, optimizer) else []


def hash_talks(talks):
    """SHA-256, hex, of conversations: config.json says which ones they were, and not what is in them."""
    return hashlib.sha256(json.dumps(talks, sort_keys=True).encode()).hexdigest()


def make_transcript(answer, lessons, own):
    """A function of params -> [(question, answer)]: two held-out questions of each Lesson, one of the user's own."""
    asked = [lesson_messages(lesson, number, held_out=True)[:-1] for lesson in lessons for number in (0, 1)]
    asked += [messages[:1] for messages in own[:1]]
    return lambda params: [
        (messages[-1]["content"], spell_parts(parts))
        for messages, parts in zip(asked, answer(params, asked), strict=True)
    ]


# %% [markdown]
# ## Sweep
#
# 03 sweeps it with `--task chat`: every trial begins with the same weights and learns from the same mixture, and only
# the rates and the schedule differ. The model keeps its shape.

# %%
TUNING_SPACE = {"final_lr_frac": {"min": 0.0, "max": 0.3}, "warmdown_ratio": {"min": 0.2, "max": 1.0}}
SHORT_TUNING = {"chip": {"num_iterations": 300}, "gpu": {"num_iterations": 300}, "laptop": {"num_iterations": 100}}


class TuningMaterial(NamedTuple):
    """What the trials of a sweep begin with and learn from; name and revision: those of the data."""

    name: str
    revision: str
    base: tuple  # (ModelFiles, Model, Optimizer)
    tokenizer: object
    lessons: list
    task: dict  # the arguments of fine_tuning that are the same in all trials


def choose_tuning(asked):
    """The SweepChoice of fine-tuning the model that asked["base"] names, or the newest run."""
    source = asked["base"] or newest_run(asked["out"] or Run().out, lambda about: not is_chat(about))
    require(source, "base", "", "there is no run yet to fine-tune: train one first, or name one with --base")
    files, model, optimizer, base = train.open_base(source, asked["optimizer"])
    named = train.names_for_sweep(source, model, optimizer, asked["model"])
    own = read_conversations(asked["conversations"]) if asked["conversations"] else []
    presets, counts_of = chat_presets(files, model, optimizer, base, asked["data"], asked["mixture"], own)
    presets = {name: presets[name] | short for name, short in SHORT_TUNING.items() if name in presets}
    rates = {name: fields["learning_rate"] for name, fields in presets.items()}
    spread = {name: {"distribution": "log_uniform_values", "min": r / 8, "max": r * 4} for name, r in rates.items()}
    counts_by_data = {fields["data"]: counts_of[name] for name, fields in presets.items()}
    hashes, moments = hash_base(files), hash_moments(files, optimizer)

    def open_material(data, num_shards, kept):
        tokenizer, counts = tok.load_tokenizer(files.tokenizer), counts_by_data[data]
        sources, commits, lessons = open_sources(counts, chat_tokens(tokenizer).encode, own)
        origin = {"commits": commits, "base": hashes, "own": hash_talks(own)}
        parts = {"sources": sources, "counts": counts, "origin": origin}
        return TuningMaterial(
            **talk_data(counts, origin),
            base=(files, model, optimizer), tokenizer=tokenizer, lessons=list(lessons.values()), task=parts,
        )  # fmt: skip

    return SweepChoice(
        *named,
        presets,
        {name: {"learning_rate": spread[name], **TUNING_SPACE} for name in presets},
        open_material,
        facts={"task": "chat", "base": source, "base_sha256": " ".join(hashes + moments), "mixture": asked["mixture"]},
    )


def prepare_trial(config, material):
    """What `train` is handed of a trial: the Task, and the base that it begins with."""
    files, model, optimizer = material.base
    require(material.lessons or not config.eval_core_every, "metric", "tasks/", "the mixture has no graded lesson")
    task = fine_tuning(config, tokenizer=material.tokenizer, lessons=material.lessons, **material.task)
    return {"task": task, "start": functools.partial(load_start, files, config, model, optimizer)}


def tuning_command(known):
    """The command that fine-tunes at length, for the constants of a sweep."""
    mixture = f" --mixture '{known['mixture']}'" if known["mixture"] else ""
    return f"uv run 07_chat.py --model {known['base']}{mixture}"


TUNING = SweepTask("07_chat.TUNING", choose_tuning, prepare_trial, tuning_command, arrays=("x", "y", "mask"))

# %%
OVERRIDES = ""  # @param ["", "--data hub", "--num_iterations 200"] {allow-input: true}

if __name__ == "__main__":
    prepare()
    train.export_if_asked(OVERRIDES)
    ready = find_chat(OVERRIDES)
if __name__ == "__main__" and not ready:
    files, model, optimizer, base = choose_base(OVERRIDES)
    run, config, counts, own = choose_chat(files, model, optimizer, base, OVERRIDES)
    say(f"model: {files.source}; mixture: {', '.join(f'{count:,} {name}' for name, count in counts.items())} an epoch")
    say(f"optimizer: {optimizer.name}, with the moments of {config.steps_before:,} steps")
    check_talk(run)
    run = train.show_fit(config, run, model, optimizer=optimizer, batch=("x", "y", "mask"))
    tokenizer = tok.load_tokenizer(files.tokenizer)
    sources, commits, lessons = open_sources(counts, chat_tokens(tokenizer).encode, own)

# %% [markdown]
# What does it say before? It has never seen a question.


# %%
def describe_accuracies(when, outcomes):
    """A line: the accuracy of each kind of question with its standard error."""
    shares = (f"{o.label} {accuracy(o):.3f} +- {standard_error(o):.3f}" for o in outcomes)
    return f"{when}: {', '.join(shares)} of {outcomes[0].total} questions each"


if __name__ == "__main__" and not ready:
    answer = make_answering(config, model, tokenizer)
    lessons = list(lessons.values())
    before = ask_lessons(answer, files.load_params(config, model), lessons, run.questions)
    if before:
        say(describe_accuracies("before", before))

# %%
if __name__ == "__main__" and not ready:
    hub_token = read_secret("HF_TOKEN")

    def prepare_chat(run, config, folder, model):
        """(tokenizer, what `train` is handed besides), as train_run asks for it."""
        origin = {"commits": commits, "base": hash_base(files), "own": hash_talks(own)}
        return tokenizer, {
            "task": fine_tuning(config, sources, counts, tokenizer, lessons, origin),
            "sample": make_transcript(answer, lessons, own),
            "start": functools.partial(load_start, files, config, model, optimizer),
        }

    result, tokenizer, mirror = train.train_run(run, config, hub_token, model, optimizer, prepare_chat)

# %% [markdown]
# ## Look
#
# The same questions again. None of these numbers and words has been in the training.

# %%
if __name__ == "__main__" and not ready:
    if before:
        say(describe_accuracies("after", ask_lessons(answer, result.params, lessons, run.questions)))
    for question, text in result.samples:
        say(f"user: {question}\nmodel: {text}")

# %% [markdown]
# ## Save
#
# As 02 saves, and the tokenizer carries the chat template: `transformers.AutoTokenizer.apply_chat_template` gives the
# very tokens of the training.

# %%
CHAT_LOADING = """
import importlib
chat = importlib.import_module("07_chat")  # in a clone of {repository}
config, params, tokenizer, model = chat.train.open_model({source!r})
answer = chat.make_answering(config, model, tokenizer)
[parts] = answer(params, [[{{"role": "user", "content": {prompt!r}}}]])
print(chat.spell_parts(parts))
"""
PURPOSE = """fine-tuned by onechip on conversations. It answers questions, and calls a calculator by writing to it.
What it writes may be wrong or offensive."""

if __name__ == "__main__" and not ready and is_first():
    say(describe_result(result._replace(samples=[]), config))  # the samples stand above
    folder = train.export_model(
        result, tokenizer, mirror.repo if mirror else "", chat=True, loading=CHAT_LOADING, purpose=PURPOSE
    )
    upload_folder(folder, names_of_files(folder), hub_token, run.hub_repo, f"onechip-{run.name}")

# %% [markdown]
# ## Talk
#
# Every way to talk to it is the same engine behind another door:
#
# - here: the cell at the end asks for a question below itself, and `--serve` shows the page through Colab's own proxy;
# - `uv run 07_chat.py --talk` in a terminal: `/help` lists commands, Ctrl-C stops an answer;
# - `uv run 07_chat.py --serve`: a page to chat on at http://127.0.0.1:8000, and OpenAI's API below `/v1`.
#
# It is a small model: it knows its lessons, and invents the rest. `--tools python` also runs what it writes as Python,
# in a sandbox (docs/sandbox.md).

# %%
if __name__ == "__main__" and (ready or run.talk or run.serve or in_notebook()):
    if ready:
        run = ChatRun(**parse_settings(ChatRun, overrides=OVERRIDES)[0])
        check_talk(run)
        opened = train.open_model(ready.source)
    else:
        opened = train.Opened(config, result.params, tokenizer, model)
    desk = TalkDesk(
        Path(ready.source if ready else run.name).name, opened, train.attention_parts, run, train.open_model
    )
    say(f"talking to {desk.talker.name}: {desk.about}")
    if in_notebook() and run.serve:
        served = serve_in_notebook(desk.talker, run.port)
    elif not in_notebook():
        talk(desk, run)

# %%
if __name__ == "__main__" and in_notebook():
    chat_in_cell(desk.talker, TalkSettings(run.temperature, run.top_k))
