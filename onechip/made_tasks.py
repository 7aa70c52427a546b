"""Tasks made by rule, for where there is no network: from documents of Python that a model has not seen, and from none.

In each task the right answer is at every place equally often, and as often the longest as the shortest, so that who
reads no question is at the level of guessing: 1 / choices, or LUCKY where an answer is written. The ceiling is 1 where
a rule of Python or of the task decides, and lower, as said, where several answers can be right.
"""

import collections
import io
import keyword
import random
import re
import tokenize
from typing import NamedTuple

from onechip.questions import EvalTask

SEED, COUNT = 20251128, 200  # items of a task at most
LUCKY = 0.02  # accuracy of writing, every time, the answer that is right most often
LETTERS = "abcdefghiklmnoprstuvwy"
CLOSING = {"(": ")", "[": "]", "{": "}"}
ENDS = (":", ",", ")", "(")  # what a line of Python may end with
WORDS = (
    "apple bread chair dance eagle flame grape house juice knife lemon mouse night ocean piano queen river stone table "
    "voice"
).split()


class Line(NamedTuple):
    """A line of a document. number: its place there; text: without the end; indent: blanks before it."""

    document: int
    number: int
    text: str
    indent: int


def code_lines(documents):
    """[[Line]] of documents: those that have letters, are no comment and are not long."""
    found = []
    for d, text in enumerate(documents):
        rows = []
        for n, row in enumerate(text.splitlines()):
            body = row.strip()
            if 8 <= len(body) <= 70 and re.search("[a-z]", body) and body[0] not in "#\"'":
                rows.append(Line(d, n, row.rstrip(), len(row) - len(row.lstrip())))
        found.append(rows)
    return found


def before(documents, line, count=5):
    """The `count` lines ahead of a Line in its document, as text that ends with a line's end; "" at the top."""
    rows = documents[line.document].splitlines()[max(0, line.number - count) : line.number]
    return "".join(row.rstrip() + "\n" for row in rows)


def with_lengths(rng, gold, candidates, count):
    """`count` candidates, as many of them shorter than gold as chance would have it; None if there are too few.

    Where gold stands among the lengths is drawn, so that a length says nothing. Those near in length come first.
    """
    shorter = rng.randint(0, count)
    near = sorted({c for c in candidates if c != gold}, key=lambda c: (abs(len(c) - len(gold)), c))
    groups = [c for c in near if len(c) < len(gold)], [c for c in near if len(c) > len(gold)]
    if len(groups[0]) < shorter or len(groups[1]) < count - shorter:
        return None
    return groups[0][:shorter] + groups[1][: count - shorter]


def arrange(rng, items, gold, others):
    """(choices, place of the right one): the place goes round with the number of items so far."""
    place = len(items) % (len(others) + 1)
    choices = rng.sample(others, len(others))
    return [*choices[:place], gold, *choices[place:]], place


def draw_some(rng, pool, count):
    """The pool in random order, at most `count` times what a task takes."""
    return rng.sample(pool, min(len(pool), count * COUNT))


# ----------------------------------------------------------------------------------------------------------------------
# From documents


def next_line(rng, documents, lines):
    """Which of four lines, all indented alike, comes next?"""
    everything, items = [line for rows in lines for line in rows], []
    by_indent = {}
    for line in everything:
        by_indent.setdefault(line.indent, []).append(line)
    for line in draw_some(rng, everything, 4):
        others = rng.sample(by_indent[line.indent], min(60, len(by_indent[line.indent])))
        context = before(documents, line)
        candidates = [o.text for o in others if o.document != line.document and o.text not in context]
        found = with_lengths(rng, line.text, candidates, 3)
        if context.strip() and found:
            choices, gold = arrange(rng, items, line.text, found)
            items.append({"query": context.removesuffix("\n"), "choices": choices, "gold": gold})
    return EvalTask("next_line", "multiple_choice", items[:COUNT], 0, "\n", 1 / 4)


def line_before(rng, documents, lines):
    """Which of two beginnings is this line the next one of? They are three lines each, of different documents."""
    pool, items = [line for rows in lines for line in rows if line.number >= 3], []
    for line in draw_some(rng, pool, 4):
        gold, other = before(documents, line, 3), rng.choice(pool)
        found = with_lengths(rng, gold, [before(documents, o, 3) for o in rng.sample(pool, 30)], 1)
        if other.document != line.document and gold.strip() and found and found[0].strip():
            options, place = arrange(rng, items, gold.removesuffix("\n"), [found[0].removesuffix("\n")])
            items.append({"context_options": options, "continuation": line.text, "gold": place})
    return EvalTask("line_before", "schema", items[:COUNT], 0, "\n", 1 / 2)


def attribute(rng, documents, lines):
    """Which of four names follows `self.`? The right one has occurred in the lines before."""
    names = [sorted(set(re.findall(r"\bself\.([a-z_]{4,})", text))) for text in documents]
    items = []
    for line in draw_some(rng, [line for rows in lines for line in rows if "self." in line.text], 12):
        place = line.text.rindex("self.") + len("self.")
        match, context = re.match("[a-z_]{4,}", line.text[place:]), before(documents, line, 8)
        if not match or f"self.{match[0]}" not in context + line.text[: place - 5]:
            continue
        others = [n for d in rng.sample(range(len(names)), min(40, len(names))) if d != line.document for n in names[d]]
        found = with_lengths(
            rng, match[0], [name for name in others if f"self.{name}" not in documents[line.document]], 3
        )
        if found:
            choices, gold = arrange(rng, items, match[0], found)
            items.append({"query": context + line.text[:place], "choices": choices, "gold": gold})
    return EvalTask("attribute", "multiple_choice", items[:COUNT], 0, "", 1 / 4)


def open_brackets(text):
    """[(place, bracket that must close next)] after each token of a line of Python that is inside brackets."""
    stack, found = [], []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.OP and token.string in CLOSING:
                stack.append(CLOSING[token.string])
            elif token.type == tokenize.OP and token.string in CLOSING.values():
                if not stack or stack.pop() != token.string:
                    return []
                continue
            if stack and token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING):
                found.append((token.end[1], stack[-1]))
    except (tokenize.TokenError, IndentationError, SyntaxError):
        return found
    return found


def closing_bracket(rng, documents, lines):
    """Which bracket closes first? Only the innermost open one can: right answers are as many of each kind."""
    pool, items = {kind: [] for kind in CLOSING.values()}, []
    for line in draw_some(rng, [line for rows in lines for line in rows if "[" in line.text or "{" in line.text], 20):
        for place, kind in open_brackets(line.text.strip()):
            pool[kind].append(before(documents, line, 2) + " " * line.indent + line.text.strip()[:place])
    least = min(COUNT // 3, *map(len, pool.values()))
    for queries in zip(*(rng.sample(pool[kind], least) for kind in pool), strict=True):
        for gold, query in zip(pool, queries, strict=True):
            choices, place = arrange(rng, items, gold, [kind for kind in pool if kind != gold])
            items.append({"query": query, "choices": choices, "gold": place})
    return EvalTask("closing_bracket", "multiple_choice", items, 0, "", 1 / 3)


def line_end(rng, documents, lines):
    """What does this line end with: a colon, a comma, a bracket that closes or one that opens? As often each."""
    pool, items = {end: [] for end in ENDS}, []
    for line in (line for rows in lines for line in rows):
        if line.text[-1] in pool and re.fullmatch(r".*[\w)\]'\"]", line.text[:-1]):
            pool[line.text[-1]].append(line)
    least = min(COUNT // len(ENDS), *map(len, pool.values()))
    for found in zip(*(rng.sample(pool[end], least) for end in ENDS), strict=True):
        for end, line in zip(ENDS, found, strict=True):
            choices, gold = arrange(rng, items, f"{end}\n", [f"{other}\n" for other in ENDS if other != end])
            items.append({"query": before(documents, line, 3) + line.text[:-1], "choices": choices, "gold": gold})
    return EvalTask("line_end", "multiple_choice", items, 0, "", 1 / 4, 0.98)


FOLLOWS = {"in": r"for \w+", "import": r"from [\w.]+", "None": r"\w+ is not"}  # a word, and what it follows


def grammar_word(rng, documents, lines):
    """Write the word that has to come: `in` after `for name`, `import` after `from module`, or, nearly always, `None`
    after `is not`; as often each."""
    pool = {word: [] for word in FOLLOWS}
    for line in (line for rows in lines for line in rows):
        for word, pattern in FOLLOWS.items():
            if match := re.match(rf"(.*\b{pattern}) {word}\b", line.text):
                pool[word].append(before(documents, line, 2) + match[1])
    least = min(COUNT // len(FOLLOWS), *map(len, pool.values()))
    items = [{"context": c, "continuation": word} for word in FOLLOWS for c in rng.sample(pool[word], least)]
    return EvalTask("grammar_word", "language_modeling", items, 0, " ", 1 / len(FOLLOWS), 0.97)


def assigned_name(rng, documents, lines):
    """Write the name that an assignment, a `for` or a `with` has just introduced, where the line after it uses it."""
    items = []
    for rows in lines:
        for line, after in zip(rows, rows[1:], strict=False):
            match = re.match(r"\s*([a-z_]{2,}) = |.*(?:for|as) ([a-z_]{2,})(?: in .*)?:$", line.text)
            name = match and (match[1] or match[2])
            found = match and re.match(rf".* {name}\b", after.text)
            if found and after.number == line.number + 1 and not keyword.iskeyword(name):
                context = before(documents, line, 2) + line.text + "\n" + after.text[: found.end() - len(name)]
                items.append({"context": context, "continuation": name})
    items = rng.sample(items, min(COUNT, len(items)))
    often = collections.Counter(item["continuation"] for item in items).most_common(1)
    lucky = max([LUCKY] + [count / len(items) for _, count in often])
    return EvalTask("assigned_name", "language_modeling", items, 0, " ", lucky, 0.9)


# ----------------------------------------------------------------------------------------------------------------------
# From rules alone


def repeated(rng):
    """Write the third word of a list that has come twice before."""
    items = []
    for _ in range(COUNT // 2):
        a, b, c = rng.sample(WORDS, 3)
        items.append({"context": f"{a} {b} {c}, {a} {b} {c}, {a} {b}", "continuation": c})
    return EvalTask("repeated", "language_modeling", items, 0, " ", LUCKY)


def spelled(rng, documents):
    """Which letter comes last in a word that is spelled? Words of the documents, each once."""
    words = sorted({word for text in documents for word in re.findall(r"\b[a-z]{5,8}\b", text)})
    items = []
    for word in rng.sample(words, min(COUNT, len(words))):
        others = rng.sample([letter for letter in LETTERS if letter != word[-1]], 3)
        choices, gold = arrange(rng, items, word[-1], others)
        items.append({"query": f"{word}: {' '.join(word[:-1])}", "choices": choices, "gold": gold})
    return EvalTask("spelled", "multiple_choice", items, 2, " ", 1 / 4)


def counted(rng):
    """Which number is missing in a row of four that count up?"""
    items = []
    for _ in range(COUNT // 2):
        start = rng.randint(10, 80)
        others = [start + 3 + step for step in (-3, -2, 2, 3)]
        choices, gold = arrange(rng, items, str(start + 3), [str(n) for n in rng.sample(others, 3)])
        row = ", ".join(str(start + i) for i in range(3))
        items.append({"query": f"[{row},", "choices": choices, "gold": gold})
    return EvalTask("counted", "multiple_choice", items, 0, " ", 1 / 4)


def make_tasks(documents):
    """The EvalTasks made from an iterable of texts, held-out Python sources; the same texts give the same tasks."""
    documents = list(documents)
    lines = code_lines(documents)
    read = (next_line, line_before, attribute, closing_bracket, line_end, grammar_word, assigned_name)
    tasks = [make(random.Random(f"{SEED} {make.__name__}"), documents, lines) for make in read]
    tasks.append(spelled(random.Random(f"{SEED} spelled"), documents))
    tasks += [make(random.Random(f"{SEED} {make.__name__}")) for make in (repeated, counted)]
    return [task for task in tasks if len(task.items) > task.shots]
