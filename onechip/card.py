"""What a run came to: the summary it prints and the model card it uploads."""

import json


def describe_result(result, config):
    """What came out of a run, in a few lines."""
    lines = [f"trained: {result.step:,} of {config.num_iterations:,} steps"]
    if result.val_bpb is not None:
        gain = 1 - result.val_bpb / result.gzip_bpb
        verdict = f"{gain:.0%} below" if gain > 0 else f"{-gain:.0%} above"
        lines[0] += f", held-out loss {result.val_loss:.3f} nats per token"
        lines.append(f"held-out text: {result.val_bpb:.3f} bits per byte, {verdict} gzip -9 with {result.gzip_bpb:.3f}")
    lines += [f"sample: {prompt!r} -> {text!r}" for prompt, text in result.samples]
    names = {
        "events.*" if p.name.startswith("events.") else p.name + "/" * p.is_dir() for p in result.run_dir.iterdir()
    }
    lines.append(f"left in {result.run_dir}: {', '.join(sorted(names))}")
    return "\n".join(lines)


PLAIN_WEIGHTS = """\
The tokenizer alone: `transformers.AutoTokenizer.from_pretrained`, or `tokenizers.Tokenizer.from_file("tokenizer.json")`
with `encode_special_tokens = True` for text that you did not write. Every document of the training text began with
`<|bos|>`, which neither adds. The weights are plain arrays by name in `params.safetensors`."""


def model_card(result, about, parameters, loading, dataset="", notes=PLAIN_WEIGHTS, library="jax"):
    """README.md of a model's repository: what it is, how good, from what, and how to load it.

    about: the run's config.json as a dict; loading: lines of Python that sample from the model, which must run as they
    stand in a clone of the repository; dataset: the Hub's name of what it was trained on, if it has one; notes: what
    else who loads it must know; library: the Hub's name of the one that `loading` uses.
    """
    config, data, commit = about["config"], about["data"], about["commit"] or "unknown"
    batch, source = config["total_batch_size"] * config["seq_len"], f"{data['name']} at revision `{data['revision']}`"
    score = "not taken yet"
    if result.val_bpb is not None:
        score = f"{result.val_bpb:.3f} bits per byte, where gzip -9 needs {result.gzip_bpb:.3f}"
        score += f"; {result.val_loss:.3f} nats per token"
    rows = {
        "held-out text": score,
        "size": f"{parameters:,} parameters, float32",
        "trained": f"{result.step:,} of {config['num_iterations']:,} steps of {batch:,} tokens, "
        f"{result.step * batch:,} in all",
        "data": f"{source}, {data['shards']} training shards",
        "tokenizer": f"byte-level BPE, {config['vocab_size']:,} tokens",
        "made with": f"commit {commit[:12]}{commit[40:]}, jax {about['jax']}, {about['device']}",
    }
    samples = "\n".join(f"{prompt!r} -> {text!r}" for prompt, text in result.samples)
    return MODEL_CARD.format(
        name=result.run_dir.name,
        datasets=f"datasets:\n- {dataset}\n" if dataset else "",
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        loading=loading.strip(),
        notes=notes,
        library=library,
        samples=samples or "none were taken",
        config=json.dumps(config, indent=2),
    )


MODEL_CARD = """\
---
license: mit
library_name: {library}
pipeline_tag: text-generation
tags:
- jax
- gpt
- nanochat
- onechip
{datasets}---
# {name}

A GPT in the manner of nanochat, pretrained from scratch by onechip. It goes on with a text; it has not been taught to
answer questions or to follow instructions, and what it writes may be wrong or offensive.

| | |
|---|---|
{table}

![Training and held-out loss](loss.png)

## Load it and sample

```python
{loading}
```

{notes}

What it wrote at the end of its training:

```
{samples}
```

## Config

```json
{config}
```

Code: MIT. The licence above is meant for the weights; the training text has its own.
"""
