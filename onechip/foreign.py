"""Other people's models, scored like ours: any causal model in Hugging Face's format.

GPT-2 is computed by JAX (gpt2.py), all others by transformers and PyTorch, which are no dependencies of this project:
`uv run --with torch --with transformers ...` makes an environment that has them. Weights are read from
safetensors only, and no code of a model's repository is run.
"""

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onechip import gpt2
from onechip.download import is_commit
from onechip.errors import UserError, first_line, require, say
from onechip.files import read_json, read_json_or_none
from onechip.hub import is_repo_name
from onechip.hubclient import load_hub, try_again, without_bars
from onechip.questions import Score
from onechip.texts import BATCH_TOKENS, batches, crop, in_questions, padded_lengths

WEIGHTS = "model.safetensors"
# What is fetched of a repository: weights as safetensors, settings, tokenizer.
WANTED = ("*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt")
# {short name: (repository, commit, or "" for the newest when it is first asked for)}
SHORT_NAMES = {"gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e")} | {
    f"gpt2-{size}": (f"openai-community/gpt2-{size}", "") for size in ("medium", "large", "xl")
}
LONGEST = 4096  # tokens that a text is cropped to, if a model's own context is longer or unknown
WITH_TORCH = "uv run --with torch --with transformers"


class Foreign(NamedTuple):
    """A model of another project. name: as it was asked for; revision: the Hub's commit, "" for a folder.

    encode(texts) -> [ids], without special tokens; bos: the id that opens a text; context: the longest input, to which
    longer texts are cropped; score: a scorer, list[list[Text]] -> list[list[Score]].
    """

    name: str
    revision: str
    encode: Callable
    bos: int
    context: int
    score: Callable


def model_folder(source):
    """The folder of a model: itself, or a Hub repository (owner/name, or gpt2 and its sizes) in the Hub's cache.

    What the cache has as a whole is taken without asking the Hub: a model stays the one that it was at first. UserError
    if it is neither folder nor repository, or cannot be had.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    repo, revision = SHORT_NAMES.get(source, (source, ""))
    names = repo.split("/")
    on_hub = len(names) == 2 and all(map(is_repo_name, names))
    require(on_hub, "model", source, f"no such folder, nor a repository, owner/name, nor {', '.join(SHORT_NAMES)}")
    hub, options = load_hub(), {"revision": revision or None, "allow_patterns": list(WANTED), "token": False}
    with contextlib.suppress(hub.errors.LocalEntryNotFoundError):
        cached = Path(hub.snapshot_download(repo, local_files_only=True, **options))
        if is_whole(cached):
            return cached
    say(f"download: {repo}{f' at {revision[:12]}' if revision else ''} to the Hub's cache")
    fetch = lambda: hub.snapshot_download(repo, **options)
    with without_bars():
        return Path(try_again(fetch, f"{repo}: no folder, and cannot be downloaded"))


def is_whole(folder):
    """Whether a folder has a model's settings and all of its weights; a download that was stopped has fewer."""
    index = read_json_or_none(folder / f"{WEIGHTS}.index.json")
    parts = set(index.get("weight_map", {}).values()) if index else {WEIGHTS}
    return all((folder / name).exists() for name in {"config.json", *parts})


def open_foreign(source):
    """Opens a causal model of a folder or the Hub as Foreign; GPT-2 through JAX, others through transformers.

    UserError names what is absent or does not fit.
    """
    folder = model_folder(source)
    about = read_json(folder / "config.json")
    open_model = open_gpt2 if about.get("model_type") == "gpt2" else open_with_torch
    encode, bos, context, score_texts = open_model(folder)
    revision = folder.name if is_commit(folder.name) else ""
    say(f"model: {source}{f' at {revision[:12]}' if revision else ''}, context {context:,} tokens ({folder})")
    return Foreign(str(source), revision, encode, bos, context, in_questions(score_texts))


def open_gpt2(folder):
    """(encode, bos, context, score_texts) of a GPT-2 in `folder`, computed by JAX in float32."""
    config = gpt2.read_config(folder / "config.json")
    encode, bos = gpt2.read_tokenizer(folder / "tokenizer.json", config)
    params = gpt2.read_params(config, folder / WEIGHTS)
    return encode, bos, config.n_positions, gpt2.make_text_scorer(config, params)


# ----------------------------------------------------------------------------------------------------------------------
# Through transformers and PyTorch


def load_torch(source):
    """(torch, transformers), imported here because they take seconds and may not be installed; UserError if not."""
    try:
        import torch
        import transformers
    except ImportError as error:
        remedy = f"needs torch and transformers ({first_line(error)}): start it with {WITH_TORCH} ..."
        raise UserError(f"model={str(source)!r}: {remedy}") from None
    return torch, transformers


def open_with_torch(folder):
    """(encode, bos, context, score_texts) of a causal model in `folder`, in float32, on a GPU if torch sees one."""
    torch, transformers = load_torch(folder)
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, **local
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others for what it cannot read
        raise UserError(f"{folder}: transformers cannot open it ({first_line(error)})") from None
    bos = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    require(bos is not None, f"{folder}: bos_token", None, "a token that opens a text is needed to score its first one")
    context = min(context_of(model.config), LONGEST)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    one = lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    encode = lambda texts: list(map(one, texts))
    return encode, bos, context, make_torch_scorer(torch, model, bos, context)


def context_of(config):
    """The longest input that a model's transformers config names; LONGEST if it names none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((size for size in named if isinstance(size, int) and size > 1), LONGEST)


def make_torch_scorer(torch, model, pad, context, budget=BATCH_TOKENS):
    """A function of texts, list[Text] -> list[Score], by a transformers causal model. Texts are padded on the right.

    Logits are kept for the places from the first to the last scored one of a batch, where the model can leave the
    others out; from them the nats are computed in float32.
    """
    device = next(model.parameters()).device
    trims = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def run(texts, length):
        """[(nats, hits)], NumPy, of each text's scored tokens."""
        tokens = torch.full((len(texts), length), pad)
        mask = torch.zeros_like(tokens)
        for row, text in enumerate(texts):
            tokens[row, : len(text.tokens)] = torch.tensor(text.tokens)
            mask[row, : len(text.tokens)] = 1
        first, last = min(text.start for text in texts) - 1, max(text.end for text in texts) - 1
        trim = {"logits_to_keep": torch.arange(first, last, device=device)} if trims else {}
        logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False, **trim).logits
        offset, found = first if trims else 0, []
        for row, text in enumerate(texts):
            own = logits[row, text.start - 1 - offset : text.end - 1 - offset].float()
            targets = tokens[row, text.start : text.end].to(device)
            nats = torch.nn.functional.cross_entropy(own, targets, reduction="none")
            found.append((nats.cpu().numpy(), (own.argmax(-1) == targets).cpu().numpy()))
        return found

    def score_texts(texts):
        texts = [crop(text, context) for text in texts]
        scores = [Score(0.0, 0, True)] * len(texts)
        scored = [i for i, text in enumerate(texts) if text.end > text.start]
        for indices, length in batches([texts[i] for i in scored], padded_lengths(context), budget):
            chosen = [scored[i] for i in indices]
            for i, (nats, hits) in zip(chosen, run([texts[i] for i in chosen], length), strict=True):
                scores[i] = Score(float(nats.sum(dtype=np.float64)), len(nats), bool(hits.all()))
        return scores

    return score_texts
