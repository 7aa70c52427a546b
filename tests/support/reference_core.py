"""CORE from its definition, slowly: one text at a time through a float64 model. It shares no code with onechip's rooms.

After DCLM's and nanochat's descriptions: shuffle by 1337, examples by 1234 + i, an item's own texts last.
"""

import math
import random

import numpy as np


def losses_and_hits(logits, tokens, start, end):
    """[(nats, likeliest)] of the tokens in [start, end); logits: (1, T) ids -> (1, T, V) float64."""
    z, found = logits(np.array([tokens]))[0], []
    for place in range(start, end):
        row = z[place - 1]
        nats = row.max() + math.log(np.exp(row - row.max()).sum()) - row[tokens[place]]
        found.append((nats, int(np.argmax(row)) == tokens[place]))
    return found


def prompts_reference(kind, items, i, shots, delimiter):
    """The texts of item i."""
    others = list(range(len(items)))
    del others[i]
    blocks = []
    for j in random.Random(1234 + i).sample(others, shots) if shots else []:
        item = items[j]
        if kind == "multiple_choice":
            blocks.append(item["query"] + delimiter + item["choices"][item["gold"]])
        elif kind == "schema":
            blocks.append(item["context_options"][item["gold"]] + delimiter + item["continuation"])
        else:
            blocks.append(item["context"].strip() + delimiter + item["continuation"])
    item, join = items[i], lambda last: "\n\n".join([*blocks, last])
    if kind == "multiple_choice":
        return [join(item["query"] + delimiter + choice) for choice in item["choices"]]
    if kind == "schema":
        return [join(context + delimiter + item["continuation"]) for context in item["context_options"]]
    question = join(item["context"].strip() + delimiter)
    return [question.strip(), question + item["continuation"]]


def shared_length(sequences):
    """Tokens that all sequences begin with."""
    length = 0
    while all(len(ids) > length and ids[length] == sequences[0][length] for ids in sequences):
        length += 1
    return length


def verdicts_reference(rows, kind, shots, delimiter, encode, bos, logits, limit=0):
    """(verdicts, mean losses of each text or hits of each token, by example) of the rows of a task's file.

    encode: one text -> ids.
    """
    items = list(rows)
    random.Random(1337).shuffle(items)
    items = items[:limit] if limit else items
    verdicts, details = [], []
    for i, item in enumerate(items):
        texts = [[bos, *encode(text)] for text in prompts_reference(kind, items, i, shots, delimiter)]
        if kind == "language_modeling":
            hits = [hit for _, hit in losses_and_hits(logits, texts[1], len(texts[0]), len(texts[1]))]
            verdicts.append(all(hits))
            details.append(hits)
            continue
        if kind == "multiple_choice":
            starts = [shared_length(texts)] * len(texts)
        else:
            starts = [len(ids) - shared_length([ids[::-1] for ids in texts]) for ids in texts]
        means = []
        for ids, start in zip(texts, starts, strict=True):
            nats = [loss for loss, _ in losses_and_hits(logits, ids, start, len(ids))] if start else []
            means.append(sum(nats) / len(nats) if nats else math.nan)
        best = 0
        for j in range(1, len(means)):
            if means[j] < means[best]:  # never true of a NaN, on either side
                best = j
        verdicts.append(best == item["gold"])
        details.append(means)
    return verdicts, details
