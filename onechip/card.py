"""A run's results: the summary it prints and the model card it uploads."""

import json

from onechip.runfolder import RunFolder


def describe_score(result):
    """The held-out score in words: bits per byte next to gzip's, and nats per token; None if none was taken."""
    if result.val_loss is None:
        return None
    nats = f"{result.val_loss:.3f} nats per token"
    if result.val_bpb is None:
        return nats
    gzip = "" if result.gzip_bpb is None else f", where gzip -9 needs {result.gzip_bpb:.3f}"
    return f"{result.val_bpb:.3f} bits per byte{gzip}; {nats}"


def describe_result(result, config):
    """What a run has reached, in a few lines: steps, scores, samples, and the files in its folder.

    result has step, val_loss, val_bpb, gzip_bpb, samples and run_dir. val_loss (nats per token), val_bpb and gzip_bpb
    (bits per byte) are None where there is no such score.
    """
    lines = [f"trained: {result.step:,} of {config.num_iterations:,} steps"]
    if result.val_loss is not None:
        lines[0] += f", held-out loss {result.val_loss:.3f} nats per token"
    if result.val_bpb is not None:
        lines.append(f"held-out text: {result.val_bpb:.3f} bits per byte{compare_with_gzip(result)}")
    lines += [f"sample: {prompt!r} -> {text!r}" for prompt, text in result.samples]
    lines.append(f"left in {result.run_dir}: {', '.join(list_files(result.run_dir))}")
    return "\n".join(lines)


def compare_with_gzip(result):
    """How far bits per byte are below or above gzip's, in words; empty where the text was not compressed."""
    if result.gzip_bpb is None:
        return ""
    gain = 1 - result.val_bpb / result.gzip_bpb
    verdict = f"{gain:.0%} below" if gain > 0 else f"{-gain:.0%} above"
    return f", {verdict} gzip -9 with {result.gzip_bpb:.3f}"


def list_files(folder):
    """Sorted names of what a folder holds, without hidden files; folders end in "/", event files are one name."""
    names = set()
    for path in folder.iterdir():
        if path.name.startswith("."):  # what a killed process left half-written
            continue
        if path.name.startswith("events."):
            names.add("events.*")
        else:
            names.add(f"{path.name}/" if path.is_dir() else path.name)
    return sorted(names)


PLAIN_WEIGHTS = """\
The tokenizer alone: `transformers.AutoTokenizer.from_pretrained`, or `tokenizers.Tokenizer.from_file("tokenizer.json")`
with `encode_special_tokens = True` for text that you did not write. Every document of the training text began with
`<|bos|>`, which neither adds. The weights are plain arrays by name in `params.safetensors`."""


def describe_data(data):
    """The training data in words: name, revision and number of shards, as far as they are known; None if nothing is."""
    parts = [data["name"]] if "name" in data else []
    parts += [f"at revision `{data['revision']}`"] if "revision" in data else []
    shards = [f"{data['shards']} training shards"] if "shards" in data else []
    return ", ".join([" ".join(parts)] * bool(parts) + shards) or None


def model_card(
    result,
    about,
    parameters,
    loading,
    dataset="",
    notes=PLAIN_WEIGHTS,
    library="jax",
    dtype="float32",
    style="nanochat",
    purpose="",
):
    """README.md of a model's repository: what it is, how good it is, what it was trained on, how to load it.

    about: the run's config.json as a dict; parameters: their number; loading: lines of Python that sample from the
    model and run unchanged in a clone of the code's repository; dataset: the Hub's name of the training data, if it has
    one; notes: what else to know for loading it; library: the Hub's name of the library that `loading` uses; dtype: of
    the weights in this repository; style: whose architecture it follows; purpose: what it was trained for, if that is
    not to continue a text.
    """
    config, commit = about["config"], about["commit"] or "unknown"
    batch = config["total_batch_size"] * config["seq_len"]
    rows = {
        "held-out text": describe_score(result) or "not evaluated yet",
        "size": f"{parameters:,} parameters, {dtype}",
        "trained": f"{result.step:,} of {config['num_iterations']:,} steps of {batch:,} tokens, "
        f"{result.step * batch:,} in all",
        "data": describe_data(about.get("data") or {}),
        "tokenizer": f"byte-level BPE, {config['vocab_size']:,} tokens",
        "trained with": f"commit {commit[:12]}{commit[40:]}, jax {about['jax']}, {about['device']}",
    }
    samples = "\n".join(f"{prompt!r} -> {text!r}" for prompt, text in result.samples)
    return MODEL_CARD.format(
        name=result.run_dir.name,
        datasets=f"datasets:\n- {dataset}\n" if dataset else "",
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items() if value),
        loading=loading.strip(),
        notes=notes,
        library=library,
        style=style,
        purpose=purpose or CONTINUES,
        tag=style.lower(),
        picture=PICTURE if RunFolder(result.run_dir).picture.exists() else "",
        samples=samples or "none were taken",
        config=json.dumps(config, indent=2),
    )


CONTINUES = """\
pretrained from scratch by onechip. It continues a text. It has not been trained to
answer questions or to follow instructions, and what it writes may be wrong or offensive."""
EVALUATION, AFTER = "## How good it is\n", "## Load it and sample\n"


def add_evaluation(card, block):
    """A card, as model_card wrote it, with a section that has `block`, in place of an older one."""
    before, _, rest = card.partition(EVALUATION)
    after = (rest or before).partition(AFTER)[2]
    before = before.partition(AFTER)[0]
    return f"{before}{EVALUATION}\n{block}\n\n{AFTER}{after}" if after else card


PICTURE = "\n![Training and held-out loss](loss.png)\n"
MODEL_CARD = """\
---
license: mit
library_name: {library}
pipeline_tag: text-generation
tags:
- jax
- gpt
- {tag}
- onechip
{datasets}---
# {name}

A GPT in the style of {style}, {purpose}

| | |
|---|---|
{table}
{picture}
## Load it and sample

```python
{loading}
```

{notes}

Samples from the end of its training:

```
{samples}
```

## Config

```json
{config}
```

The licence named above is that of the weights. The code is MIT; the training text has its own licence.
"""
