"""Scores of texts by a model: many questions at once, in few programs, and with what texts share computed once.

- The texts of a question often begin alike: ten solved examples, then one of four answers. Such a question is one row:
  the common prefix, then a branch for each text. Attention is all that has to know: a branch's queries see the prefix
  and their own branch. Everything else in a model looks at one token at a time. Rows are in answer_rows.py.
- Rows are sorted by length and padded to few lengths, as many rows at a time as make about the same number of tokens.
  So a whole evaluation takes some dozen programs.
- lm_head reads only the hidden states whose next token counts, some hundred at a time.
"""

import collections
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from onechip.answer_rows import Shape, TextRow, lay_out, padded, text_rows
from onechip.hosts import gathered
from onechip.layers import rope_and_norm, soft_cap, tokens_in_lanes
from onechip.questions import Score
from onechip.weights import cast_weights

QUEUED = 4  # batches that are sent to the device before the results of the first are waited for
MOST_SCORES = 1 << 28  # of a batch: 1 GiB in float32


# ----------------------------------------------------------------------------------------------------------------------
# Programs: hidden states, then losses


class Parts(NamedTuple):
    """Attention, from the notebook that defines it.

    tables(length) -> cosines and signed sines (length, H) of the rotary angles. attention(length) -> a function of
    (q, k, v, tables, window, scale). masked_attention(q, k, v, mask, scale), of rotated and normed q and k.
    """

    tables: Callable
    attention: Callable
    masked_attention: Callable


def rotate_each(x, cos, sin):
    """rope_and_norm of x (B, T, heads, H) with angles (B, T, H) of each row's own."""
    return jax.vmap(lambda x, cos, sin: rope_and_norm(x[None], cos, sin)[0])(x, cos, sin)


def make_attend(config, parts, batch):
    """A function of a layer's number -> its `attend`, as a model's block calls it, for a batch (prefix, length,
    branches) of prefixes and branches side by side."""
    prefix, length, (_, _, position, branch) = batch
    P, Q = prefix.shape[1], position.shape[1]
    tables = [jnp.asarray(table) for table in parts.tables(P + Q)]
    rope, own_rope = [table[:P] for table in tables], [table[position] for table in tables]
    columns = jnp.broadcast_to(jnp.arange(P), prefix.shape)
    seen = jnp.broadcast_to((columns < length[:, None])[:, None], (len(prefix), Q, P))
    seen = jnp.concatenate([seen, branch[:, :, None] == branch[:, None]], axis=2)
    distance = position[:, :, None] - jnp.concatenate([columns, position], axis=1)[:, None]

    def attend(i, q, k, v, more=None):
        if more is not None:
            gate, rows = more
            v = v + gate.astype(v.dtype)[..., None] * rows.reshape(v.shape)
        window, scale = config.long_windows[i], config.score_scale
        out = parts.attention(P)(q[:, :P], k[:, :P], v[:, :P], rope, window, scale)
        if Q:
            keys = jnp.concatenate([rope_and_norm(k[:, :P], *rope), rotate_each(k[:, P:], *own_rope)], axis=1)
            mask = seen & (distance >= 0) & (distance < window)
            own = parts.masked_attention(rotate_each(q[:, P:], *own_rope), keys, v, mask[:, None, None], scale)
            out = jnp.concatenate([out, own], axis=1)
        return out, None

    return lambda i: functools.partial(attend, i)


def hidden_states(config, model, parts, params, prefix, length, branches):
    """Final hidden states (R, P + Q, D) of a Batch's arrays; params: cast already."""
    tokens = jnp.concatenate([prefix, branches[0]], axis=1)
    with jax.named_scope("embedding"):
        x = model.embed(config, params, prefix, None)
        if branches.shape[2]:  # each token by itself, with the one before it
            own = model.embed(config, params, *(branches[:2].reshape(2, -1, 1)))
            x = jnp.concatenate([x, own.reshape(*branches.shape[1:], -1)], axis=1)
    attend, streams = make_attend(config, parts, (prefix, length, branches)), [x]
    for i in range(config.n_layer):
        streams.append(tokens_in_lanes(model.block(config, params, i, streams, tokens, attend(i))[0]))
    return model.readout(config, params, streams)


def judge_places(softcap, lm_head, hidden, place, target):
    """(cross-entropy in nats, whether the target is the likeliest token, the first of equal ones), float32 and bool
    (M,), of hidden states (R, T, D) at `place` (M,) in their rows, one after another."""
    with jax.named_scope("lm_head"):
        h = hidden.reshape(-1, hidden.shape[2])[place]
        z, _ = soft_cap(softcap, jnp.einsum("md,dv->mv", h, lm_head, preferred_element_type=jnp.float32))
    with jax.named_scope("loss"):
        ids, highest = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1), jnp.max(z, axis=-1, keepdims=True)
        of_target = jnp.sum(jnp.where(ids == target[:, None], z, 0), axis=-1)
        likeliest = jnp.min(jnp.where(z == highest, ids, z.shape[1]), axis=-1)
        return jax.nn.logsumexp(z, axis=-1) - of_target, likeliest == target


class Answerer:
    """Scores of questions by one model, for any parameters: answerer(params) is a function of questions -> Scores.

    batches: {Shape: how many batches had it so far}; each Shape is a program, compiled when it is first met.
    padding: {Shape: tokens of padding that its rows were given more, in place of a program of their own}.
    """

    def __init__(self, config, model, split, parts, sizes, share=True):
        """split: a NamedSharding that splits rows over the mesh; sizes: BatchSizes; share: whether a common prefix is
        computed once."""
        self.config, self.split, self.sizes, self.share = config, split, sizes, share
        self.batches, self.padding = collections.Counter(), collections.Counter()
        self.judged = max(32, sizes.tokens // 8)  # hidden states that lm_head reads at a time, on each device
        whole, (rows,) = PartitionSpec(), split.spec
        over_mesh = functools.partial(jax.shard_map, mesh=split.mesh, check_vma=False)
        places = (whole, split.spec, split.spec, PartitionSpec(None, rows))
        run = functools.partial(hidden_states, config, model, parts)
        self.hidden_states = jax.jit(over_mesh(run, in_specs=places, out_specs=split.spec))
        places = (whole, *[split.spec] * 3)
        judge = over_mesh(functools.partial(judge_places, config.softcap), in_specs=places, out_specs=split.spec)
        everywhere = {} if split.is_fully_addressable else {"out_shardings": NamedSharding(split.mesh, whole)}
        self.judge = jax.jit(judge, **everywhere)  # each host reads what all have found
        self.cast = jax.jit(functools.partial(cast_weights, model.weights(config), dtype=config.dtype))

    def size_of(self, prefix, branches):
        """Padded tokens of a row of these sizes: its prefix's and its branches'."""
        return padded(prefix, self.sizes.unit), padded(branches, self.sizes.unit)

    def shape_of(self, prefix, branches):
        """The Shape of batches for rows of these sizes."""
        P, Q = self.size_of(prefix, branches)
        rows = max(1, self.sizes.tokens // (P + Q))
        if Q:
            rows = min(rows, max(1, MOST_SCORES // (self.config.n_head * Q * (P + Q))))
        return Shape(self.split.mesh.size * rows, P, Q)

    def choose_shape(self, row):
        """The Shape for a batch that begins with a row: its own, or a larger one whose program is there already, until
        what that adds in padding would have been worth a program."""
        own = self.shape_of(*row.sizes)
        known = min((shape for shape in self.batches if shape.holds(own)), key=lambda s: s.width, default=own)
        self.padding[own] += known.rows * (known.width - own.width)
        return known if self.padding[own] <= self.sizes.program else own

    def plan(self, questions):
        """[(Shape, its Rows)] of all questions, the longest first; a Text's number counts through all of them."""
        numbers, rows, batches = itertools.count(), [], []
        for texts in questions:
            numbered = [(next(numbers), text) for text in texts]
            if self.share and numbered:
                rows += text_rows(numbered, lambda *sizes: sum(self.size_of(*sizes)))
            else:
                rows += [TextRow([text], 0) for text in numbered]
        branches = lambda row: self.size_of(*row.sizes)[1]
        rows.sort(key=lambda row: (branches(row), row.sizes[0]), reverse=True)
        for _, group in itertools.groupby(rows, branches):
            group = list(group)
            while group:
                shape = self.choose_shape(group[0])
                self.batches[shape] += 1
                batches.append((shape, group[: shape.rows]))
                group = group[shape.rows :]
        return batches

    def lower(self, params, shape):
        """The two programs of a Shape, traced and not compiled: jax.stages.Lowered of `hidden_states` and `judge`.

        params: arrays or shapes, as they are before the cast.
        """
        params, places = jax.eval_shape(self.cast, params), self.split
        ints = lambda *sizes, spec=places.spec: jax.ShapeDtypeStruct(
            sizes, jnp.int32, sharding=NamedSharding(places.mesh, spec)
        )
        R, P, Q = shape
        rows = ints(R, P), ints(R), ints(4, R, Q, spec=PartitionSpec(None, *places.spec))
        states = self.hidden_states.lower(params, *rows)
        hidden = jax.ShapeDtypeStruct((R, P + Q, self.config.n_embd), self.config.dtype, sharding=places)
        picked = ints(places.mesh.size * self.judged)
        return states, self.judge.lower(params["lm_head"], hidden, picked, picked)

    def send(self, params, shape, rows):
        """Starts a batch on the devices; [(numbers, nats, hits)] of what counts, the last two still on their way."""
        batch, devices = lay_out(rows, shape), self.split.mesh.size
        hidden = self.hidden_states(params, batch.prefix, batch.length, batch.branches)
        place, target, number = (np.concatenate(a) for a in (batch.place, batch.target, batch.number))
        owner, inside = np.divmod(place, shape.rows // devices * shape.width)
        mine = [np.flatnonzero(owner == device) for device in range(devices)]
        sent = []
        for start in range(0, max(map(len, mine)), self.judged):
            picks = [m[start : start + self.judged] for m in mine]
            at = np.concatenate([d * self.judged + np.arange(len(pick)) for d, pick in enumerate(picks)])
            picks, args = np.concatenate(picks), np.zeros((2, devices * self.judged), np.int32)
            args[:, at] = inside[picks], target[picks]
            sent.append((number[picks], at, self.judge(params["lm_head"], hidden, *args)))
        return sent

    def __call__(self, params):
        """A function of questions -> Scores for these parameters, which are cast once and copied to every device."""
        whole = NamedSharding(self.split.mesh, PartitionSpec())
        return functools.partial(self.score, jax.device_put(self.cast(gathered(params)), whole))

    def score(self, params, questions):
        """[[Score]] of the texts of each question; params: cast already."""
        flat = list(itertools.chain.from_iterable(questions))
        nats, hits, waiting = np.zeros(len(flat)), np.zeros(len(flat), np.int64), collections.deque()

        def collect(count):
            while len(waiting) > count:
                for number, at, found in waiting.popleft():
                    losses, right = (np.asarray(array)[at] for array in found)
                    np.add.at(nats, number, np.float64(losses))
                    np.add.at(hits, number, right)

        for shape, rows in self.plan(questions):
            waiting.append(self.send(params, shape, rows))
            collect(QUEUED)
        collect(0)
        counts = [text.end - text.start for text in flat]
        scores = map(Score, nats.tolist(), counts, (hits == counts).tolist())
        return [list(itertools.islice(scores, len(texts))) for texts in questions]
