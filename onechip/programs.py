"""The engine's programs on its devices: compiled once for each size, with the parameters and rings that they work on.

Rows are split over all devices of a mesh, parameters are whole on each: no device waits for another.
"""

import functools

import jax
from jax.sharding import NamedSharding, PartitionSpec

from onechip.decoding import Decoder
from onechip.mesh import AXES
from onechip.quantize import quantize_weights
from onechip.ring import empty_rings
from onechip.speculate import write_with_draft
from onechip.weights import cast_weights


class Programs:
    """A model, or a model and a smaller one, with room for `rows` texts of `length` tokens on the devices of a mesh.

    models: [(config, params, model, parts)], one or two; int8: whether matrices are kept in 8 bits. Results come back
    as NumPy arrays. compiled: how many programs there are.
    """

    def __init__(self, models, rows, length, mesh, int8):
        self.mesh, self._int8 = mesh, int8
        self._split, self._whole = PartitionSpec(AXES), PartitionSpec()
        self._decoders = [Decoder(config, model, parts, length) for config, _, model, parts in models]
        make = lambda config: jax.jit(
            functools.partial(empty_rings, config, rows, length), out_shardings=NamedSharding(mesh, self._split)
        )
        self._make_rings = [make(config) for config, *_ in models]
        self._rings = tuple(make() for make in self._make_rings)
        self._params = tuple(self._placed(d, m[1]) for d, m in zip(self._decoders, models, strict=True))
        self._programs = {}

    def _placed(self, decoder, params):
        table, dtype = decoder.model.weights(decoder.config), decoder.config.dtype
        prepare = functools.partial(quantize_weights if self._int8 else cast_weights, table, dtype=dtype)
        whole = NamedSharding(self.mesh, self._whole)
        params = jax.device_put(params, whole)  # from a training's mesh, which may have its devices in another order
        return jax.jit(prepare, out_shardings=whole)(params)

    def load(self, params):
        """Other parameters of the (larger) model, in the place of those before."""
        self._params = (self._placed(self._decoders[0], params), *self._params[1:])
        self._rings = self._rings or tuple(make() for make in self._make_rings)

    def free(self):
        """Gives the memory of the (larger) model's parameters and of all rings back, until `load`."""
        self._params, self._rings = (None, *self._params[1:]), None

    @property
    def compiled(self):
        return len(self._programs)

    def _run(self, name, function, *arrays):
        """function(params, rings, *arrays) -> (rings, results), compiled under that name; the results on the host."""
        if name not in self._programs:
            specs = (self._whole, self._split, *[self._split] * len(arrays))
            on_mesh = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=self._split, check_vma=False)
            self._programs[name] = jax.jit(on_mesh, donate_argnums=1)
        self._rings, results = self._programs[name](self._params, self._rings, *arrays)
        return jax.device_get(results)

    def read(self, tokens, lengths, row, knobs):
        """(first tokens (R,), log-probabilities) of prompts (R, P), an equal part for each device; row: on its own."""

        def read(params, rings, *arrays):
            done = [d.read_prompts(p, r, *arrays) for d, p, r in zip(self._decoders, params, rings, strict=True)]
            return tuple(rings for rings, _ in done), done[0][1]

        return self._run(("read", tokens.shape), read, tokens, lengths, row, knobs)

    def write(self, turn, span):
        """Written: D tokens a row at most, one after another."""

        def write(params, rings, turn):
            first, written = self._decoders[0].write_tokens(params[0], rings[0], turn, span)
            return (first, *rings[1:]), written

        return self._run(("write", turn.forced.shape, span), write, turn)

    def check(self, turn, span, drafts):
        """Written, of drafts (B, D - 1)."""

        def check(params, rings, turn, drafts):
            first, written = self._decoders[0].check_drafts(params[0], rings[0], turn, drafts, span)
            return (first, *rings[1:]), written

        return self._run(("check", turn.forced.shape, span), check, turn, drafts)

    def write_drafted(self, turn, span):
        """Written, of drafts by the smaller model."""
        write = functools.partial(write_with_draft, *self._decoders)
        return self._run(("draft", turn.forced.shape, span), lambda *a: write(*a, span), turn)
