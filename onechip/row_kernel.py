"""Gradients of embeddings added to float32 sums, as a Pallas kernel for a TPU: rows.py says why.

XLA's own scatter reads the whole table through VMEM, a window at a time, and adds row by row: by the bundles that it
schedules 0.1 ms for 8,192 rows of 768 channels, on top of the table's way to the chip and back. This kernel moves only
the sums of the tokens that a block has, all embeddings at once.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from onechip.kernels import LANES, interpreted_off_tpu

VMEM_BYTES = 56 * 2**20  # that the kernel takes at most, of 128 MiB


def block_rows(count, sublanes, width):
    """Tokens that the kernel takes at a time: the most that divide `count` and fit VMEM; 0 if 16 do not.

    sublanes: of 128 channels each; width: bytes of a gradient's number.
    """
    of_token = LANES * (4 * (-(-sublanes // 8) * 8) + 2 * width * sublanes)
    sizes = (size for size in (256, 128, 64, 32, 16) if count % size == 0)
    return next((size for size in sizes if size * of_token <= VMEM_BYTES), 0)


def distinct(ids):
    """(the distinct ids of each block (blocks, block), in front and ascending; how many there are (blocks,))."""
    ids = jnp.sort(ids, axis=1)
    first = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    last = jnp.iinfo(jnp.int32).max
    return jnp.sort(jnp.where(first, ids, last), axis=1), jnp.sum(first, axis=1, dtype=jnp.int32)


def add_block(unique_ids, counts, unique_ref, ids_ref, *refs):
    """Adds a block of gradients, an array (block, S_i * 128) for each embedding, to sums (V, S, 128) in HBM.

    unique_ids (blocks * block), counts (blocks): as `distinct` gives them, in scalar memory; unique_ref (block, 1) and
    ids_ref (1, block): the same block's, and its tokens; kept (block, S, 128): the sums of the distinct tokens.
    A product with a matrix of zeros and ones adds what belongs together: exact, in float32.
    """
    *rows_refs, _, sums, kept, done = refs
    block = kept.shape[0]
    number, start = counts[pl.program_id(0)], pl.program_id(0) * block
    fetch = lambda i: pltpu.make_async_copy(sums.at[unique_ids[start + i]], kept.at[i], done)
    store = lambda i: pltpu.make_async_copy(kept.at[i], sums.at[unique_ids[start + i]], done)

    def for_each(act):
        jax.lax.fori_loop(0, number, lambda i, _: act(i), None)

    for_each(lambda i: fetch(i).start())
    dtype, line = rows_refs[0].dtype, 0
    same = (unique_ref[...] == ids_ref[...]).astype(dtype)
    for_each(lambda i: fetch(i).wait())
    precision = "highest" if dtype == jnp.float32 else None
    for rows_ref in rows_refs:
        for channel in range(0, rows_ref.shape[1], 2 * LANES):  # a matrix unit is 256 wide
            part = rows_ref[:, channel : channel + 2 * LANES]
            total = jnp.dot(same, part, precision=precision, preferred_element_type=jnp.float32)
            for k in range(total.shape[1] // LANES):
                kept[:, line, :] += total[:, k * LANES : (k + 1) * LANES]
                line += 1
    for_each(lambda i: store(i).start())
    for_each(lambda i: store(i).wait())


def add_by_kernel(block, sums, ids, rows):
    """sums (V, S, 128) float32 with rows added at ids (R,), `block` of them at a time.

    rows: a list of arrays (R, S_i * 128) of one dtype, each a part of the S lines.
    """
    blocks, S = ids.size // block, sums.shape[1]
    ids = ids.reshape(blocks, block)
    unique, counts = distinct(ids)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2, grid=(blocks,),
        in_specs=[
            pl.BlockSpec((None, block, 1), lambda b, *_: (b, 0, 0)),
            pl.BlockSpec((None, 1, block), lambda b, *_: (b, 0, 0)),
            *[pl.BlockSpec((block, part.shape[1]), lambda b, *_: (b, 0)) for part in rows],
            in_hbm,
        ],
        out_specs=in_hbm,
        scratch_shapes=[pltpu.VMEM((block, S, LANES), jnp.float32), pltpu.SemaphoreType.DMA],
    )  # fmt: skip

    def run(interpret, *args):
        return pl.pallas_call(
            add_block, name="add_rows", grid_spec=grid, interpret=interpret,
            input_output_aliases={len(rows) + 4: 0},
            out_shape=jax.ShapeDtypeStruct(sums.shape, sums.dtype),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",), vmem_limit_bytes=2 * VMEM_BYTES, has_side_effects=True
            ),
        )(*args)  # fmt: skip

    return interpreted_off_tpu(run, unique.reshape(-1), counts, unique[:, :, None], ids[:, None, :], *rows, sums)
