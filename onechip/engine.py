"""The engine: many texts continued at once, by few programs, on one device or several.

    engine = Engine(config, params, model, parts, rows=8)
    answer = engine.submit(TextRequest(tokens=ids, max_new_tokens=100, temperature=0.8, seed=1, stop=(end,)))
    while engine.step():  # one dispatch: some tokens for every row
        print(answer.tokens)
    answers = engine.generate_all([TextRequest(...), TextRequest(...)])  # the same, to their ends
    engine.load(params)  # other parameters of the same model, without a new program

A row takes the next request as soon as its answer has ended. `submit` and what an Answer has may be called from any
thread, `step` from one: onechip/enginethread.py has a thread that does nothing else.
"""

import threading
from collections import deque

import jax
import numpy as np

from onechip.answer import MOST_STOPS, Answer, check_request
from onechip.decoding import Turn
from onechip.draws import Knobs
from onechip.errors import require
from onechip.mesh import build_mesh
from onechip.programs import Programs
from onechip.speculate import CopyDraft, ModelDraft, propose_copies

SHORTEST_PROMPT = 32  # what prompts are padded to at least
SHORTEST_SPAN = 256  # slots of a ring that a dispatch looks at, at least: doubled as texts grow
PROMPT_TOKENS = 4096  # of prompts that a device reads together


def sizes_between(first, last):
    """[first, 2 * first, 4 * first, ..., last], none above `last`."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]


def size_for(sizes, needed):
    """The first of these sizes that is at least `needed`."""
    return next(size for size in sizes if size >= needed)


def blank_turn(rows, width=0):
    """A Turn of NumPy arrays for rows that rest, with room for `width` forced tokens."""
    zeros = lambda dtype, *more: np.zeros((rows, *more), dtype)
    knobs = Knobs(zeros(np.float32), zeros(np.int32), np.ones(rows, np.float32), zeros(np.uint32))
    token, before, start, limit, count = (zeros(np.int32) for _ in range(5))
    stops = np.full((rows, MOST_STOPS), -1, np.int32)
    return Turn(token, before, start, limit, zeros(np.int32, width), count, stops, knobs)


def set_request(turn, row, request):
    """Puts a TextRequest's knobs and stops into a Turn's row."""
    for array, value in zip(turn.knobs, (request.temperature, request.top_k, request.top_p, request.seed), strict=True):
        array[row] = value
    stops = [*request.stop, *request.pause]
    turn.stops[row] = stops + [-1] * (MOST_STOPS - len(stops))


class Engine:
    """One model that writes.

    config, params, model: as `open_model` gives them; parts: onechip.answers.Parts. rows: texts at a time, a multiple
    of the devices; length: tokens of a text at most, 0 for the model's context; at_once: tokens of a row that a
    dispatch writes; int8: whether matrices are kept in 8 bits; draft: a CopyDraft or ModelDraft, for speculative
    decoding; mesh: the jax.sharding.Mesh of its devices, the first device if None. UserError for what does not fit.
    """

    def __init__(self, config, params, model, parts, *, rows=8, length=0, at_once=8, int8=False, draft=None, mesh=None):
        mesh, self.length = mesh or build_mesh(jax.devices()[:1]), length or config.seq_len
        require(rows > 0 and rows % mesh.size == 0, "rows", rows, f"must be a multiple of the {mesh.size} devices")
        require(0 < self.length <= config.seq_len, "length", length, f"must be at most seq_len={config.seq_len}")
        require(at_once > 0, "at_once", at_once, "write at least one token a dispatch")
        models = [(config, params, model, parts)]
        if isinstance(draft, ModelDraft):
            check_draft(draft, config.vocab_size, self.length)
            models.append((draft.config, draft.params, draft.model, draft.parts))
        self.config, self.rows, self.at_once, self.draft = config, rows, at_once, draft
        self.share = rows // mesh.size  # rows of a device
        shortest = 128 if config.attn_impl in ("splash", "pallas") else SHORTEST_PROMPT  # a kernel's tiles are 128 wide
        self.prompt_sizes, self.spans = (sizes_between(n, self.length) for n in (shortest, SHORTEST_SPAN))
        self.programs = Programs(models, rows, self.length, mesh, int8)
        self.changed = threading.Condition()
        self._waiting, self._answers, self._turn = deque(), [None] * rows, blank_turn(rows)
        self.proposed = self.accepted = 0  # tokens of drafts, and how many of them were taken

    def warm_up(self):
        """Compiles all programs that requests can need, while there are none: no answer waits for one later."""
        devices, nothing = self.rows // self.share, [[]] * self.rows
        for size in self.prompt_sizes:
            for count in {1, self._at_once(size)}:
                self._read_together(size, [[]] * devices, count)
        for span in self.spans:
            if isinstance(self.draft, ModelDraft):
                self.programs.write_drafted(self._with_forced(nothing, self.draft.count + 1), span)
                continue
            self.programs.write(self._with_forced(nothing, self.at_once), span)
            if self.draft:
                turn = self._with_forced(nothing, self.draft.count + 1)
                self.programs.check(turn, span, propose_copies([None] * self.rows, nothing, self.draft))

    def load(self, params):
        """Takes other parameters of the same model; answers that are being written continue with them."""
        self.programs.load(params)

    def free(self):
        """Gives the device's memory back, all but the programs, until `load`. UserError while answers are written."""
        written = len(self._waiting) + sum(answer is not None for answer in self._answers)
        require(not written, "free", written, "answers are being written: let them end first")
        self.programs.free()

    # ------------------------------------------------------------------------------------------------------------------
    # TextRequests

    def submit(self, request):
        """The Answer to a TextRequest, which `step` writes; UserError if this engine cannot."""
        check_request(request, self.config.vocab_size, self.length)
        answer = Answer(request, self.changed)
        with self.changed:
            self._waiting.append(answer)
            self.changed.notify_all()
        return answer

    def generate_all(self, requests):
        """The Answers to TextRequests, written to their ends in this thread."""
        for request in requests:
            check_request(request, self.config.vocab_size, self.length)  # all of them, before the first gets a row
        answers = [self.submit(request) for request in requests]
        while any(answer.reason is None for answer in answers):
            with self.changed:
                self.changed.wait_for(self.runnable)
            self.step()
        return answers

    def runnable(self):
        """Whether `step` has something to do: it has not where each row waits for its tool."""
        here = [answer for answer in self._answers if answer]
        return (
            any(a.ending or not a.held for a in here)
            or bool(self._waiting)
            and (len(here) < self.rows or any(a.ending for a in self._waiting))
        )

    @property
    def accepted_share(self):
        """The share of proposed tokens that were taken; 0 if none were proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0

    def step(self):
        """Reads the prompts that there is room for, then writes some tokens for each row; whether any work is left."""
        self._end()
        self._read(self._arrivals())
        self._end()
        active = self._set_limits()
        if active.any():
            self._write(active)
            self._end()
        return bool(self._waiting) or any(self._answers)

    def end_all(self, error=None):
        """Ends all answers, as cancelled or with an error."""
        with self.changed:
            for answer in [*self._waiting, *filter(None, self._answers)]:
                answer.error, answer.ending = error, "error" if error else answer.ending or "cancelled"
        self._end()

    def _end(self):
        """Frees the rows of answers that have ended, and forgets those that no longer need one."""
        with self.changed:
            ended = [a for a in [*self._waiting, *filter(None, self._answers)] if a.ending]
            self._waiting = deque(a for a in self._waiting if not a.ending)
            self._answers = [None if a and a.ending else a for a in self._answers]
        for answer in ended:
            if answer.reason is None:
                answer.tell([])

    def _arrivals(self):
        """[(row, answer)] of answers that get a row now, the devices in turn."""
        free = sorted((i for i, a in enumerate(self._answers) if a is None), key=lambda i: (i % self.share, i))
        with self.changed:
            pairs = [(row, self._waiting.popleft()) for row in free[: len(self._waiting)]]
            for row, answer in pairs:
                self._answers[row] = answer
        return pairs

    # ------------------------------------------------------------------------------------------------------------------
    # Prompts

    def _at_once(self, size):
        """How many prompts of one size a device reads together, where there are as many."""
        return max(1, min(self.share, PROMPT_TOKENS // size))

    def _read(self, arrivals):
        """Reads the prompts of [(row, answer)], those of one size together, and gives each its first token."""
        sizes = [size_for(self.prompt_sizes, len(answer.request.tokens)) for _, answer in arrivals]
        for size in sorted(set(sizes)):
            group = [pair for pair, own in zip(arrivals, sizes, strict=True) if own == size]
            queues = [[pair for pair in group if pair[0] // self.share == i] for i in range(self.rows // self.share)]
            many = self._at_once(size)
            while any(queues):
                count = many if max(map(len, queues)) > many // 2 else 1  # two programs a size, at most half of it idle
                self._read_together(size, [queue[:count] for queue in queues], count)
                queues = [queue[count:] for queue in queues]

    def _read_together(self, size, queues, count):
        """Reads at most `count` prompts on each device, a queue for each."""
        places = count * len(queues)
        tokens, lengths, turn = np.zeros((places, size), np.int32), np.ones(places, np.int32), blank_turn(places)
        own_row = np.full(places, self.share, np.int32)  # past the last: nowhere
        pairs = [(device * count + i, *pair) for device, queue in enumerate(queues) for i, pair in enumerate(queue)]
        for place, row, answer in pairs:
            ids = answer.request.tokens
            tokens[place, : len(ids)], lengths[place], own_row[place] = ids, len(ids), row % self.share
            set_request(turn, place, answer.request)
            set_request(self._turn, row, answer.request)
            self._turn.token[row], self._turn.start[row] = ids[-1], len(ids) - 1
        first, nats = self.programs.read(tokens, lengths, own_row, turn.knobs)
        for place, row, _ in pairs:
            self._deliver(row, first[place : place + 1], nats[place : place + 1])

    # ------------------------------------------------------------------------------------------------------------------
    # Tokens

    def _set_limits(self):
        """Puts how many tokens each row may still get into the turn; (rows,) bool, which may get any."""
        for row, answer in enumerate(self._answers):
            rests = answer is None or answer.held
            self._turn.limit[row] = 0 if rests else answer.request.max_new_tokens - len(answer.tokens)
        return self._turn.limit > 0

    def _with_forced(self, forced, width):
        """The turn, with the first `width` of the tokens that are forced on each row: lists."""
        turn = self._turn._replace(forced=np.zeros((self.rows, width), np.int32))
        for row, tokens in enumerate(forced):
            turn.forced_count[row] = len(tokens[:width])
            turn.forced[row, : turn.forced_count[row]] = tokens[:width]
        return turn

    def _write(self, active):
        """One dispatch for all rows."""
        rows = [answer if on else None for answer, on in zip(self._answers, active, strict=True)]
        forced = [list(answer.forced) if answer else [] for answer in rows]
        span = size_for(self.spans, self._turn.start[active].max())
        drafts = self._propose(rows, forced) if isinstance(self.draft, CopyDraft) else None
        if isinstance(self.draft, ModelDraft):
            turn = self._with_forced(forced, self.draft.count + 1)
            written, proposed = self.programs.write_drafted(turn, span), np.full(self.rows, self.draft.count)
        elif drafts is not None:
            turn = self._with_forced(forced, self.draft.count + 1)
            written, proposed = self.programs.check(turn, span, drafts), np.sum(drafts >= 0, axis=1)
        else:
            turn = self._with_forced(forced, self.at_once)
            written, proposed = self.programs.write(turn, span), None
        for row in np.flatnonzero(active):
            count, own = int(written.counts[row]), int(turn.forced_count[row])
            if proposed is not None:
                self.proposed += max(0, int(proposed[row]) - own)
                self.accepted += max(0, count - 1 - own)
            self._deliver(row, written.tokens[row, :count], written.log_probabilities[row, :count])

    def _propose(self, rows, forced):
        """A CopyDraft's proposals (rows, count); None if there are none."""
        texts = [np.int32([*answer.request.tokens, *answer.tokens]) if answer else None for answer in rows]
        drafts = propose_copies(texts, forced, self.draft)
        return drafts if (drafts >= 0).any() else None

    def _deliver(self, row, tokens, nats):
        """Moves a row on by new tokens, and gives them to its answer."""
        turn = self._turn
        turn.start[row] += len(tokens)
        turn.before[row] = tokens[-2] if len(tokens) > 1 else turn.token[row]
        turn.token[row] = tokens[-1]
        self._answers[row].take(tokens.tolist(), nats.tolist())


def check_draft(draft, vocab_size, length):
    """UserError unless a ModelDraft's model has that vocabulary and room for `length` tokens."""
    found = draft.config.vocab_size
    require(found == vocab_size, "draft: vocab_size", found, f"must be that of the model, {vocab_size}")
    require(draft.config.seq_len >= length, "draft: seq_len", draft.config.seq_len, f"must be at least {length}")
