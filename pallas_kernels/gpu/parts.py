"""What both passes of attention on a GPU share: how a block is cut, what is read beside it, products, logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from striate.lib.masks import Mask
from striate.pallas_kernels.common import LOG2E, scored
from striate.pallas_kernels.gpu.words import in_known_words

CONSUMERS = 2  # warpgroups that compute, each with a share of the rows; one more copies
TILE = 128  # queries of a row of blocks, or keys where keys stay; a product of matrices has 64 rows at least
# Of a product of matrices; and of head_dim and the width of values together, where one kernel has both dK and dV.
WIDEST = 256
# Of a thread that computes, and of one that copies: with 128 threads each, all three of 65536.
MOST_REGISTERS, FEWEST_REGISTERS = 240, 24
SHARED_MEMORY = 220 * 1024  # bytes of a thread block on H100 and H200, less what barriers and alignment take
ACROSS, DOWN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)  # of one number a row, and one a column


def launch(name: str, body: Callable, results: list, rows: int, heads: int, scratch: NamedTuple, interpret) -> Callable:
    """The kernel of a thread block for each row and head, heads first; axes "row", "head" and "warpgroup"."""
    return plgpu.kernel(
        body,
        out_type=results,
        grid=(rows, heads),
        grid_names=("row", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=[scratch],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name=name,
    )


def passing_length(tile: int, most: int, staying: int, a_column: int) -> int:
    """Tokens of a block that passes by, of `a_column` bytes each: a tile, or so much of it as may be and fits twice.

    Not less than 64, the fewest that a product of matrices adds up.
    """
    while tile > most or (tile > 64 and 2 * tile * a_column > SHARED_MEMORY - staying):
        tile //= 2
    return tile


def stages(staying: int, a_block: int) -> int:
    """Blocks that pass by at a time, 4 at most: one that is computed with, and, where they fit, others on the way."""
    return max(1, min(4, (SHARED_MEMORY - staying) // a_block))


def tiled(*shape: int, dtype) -> plgpu.SMEM:
    """Shared memory in the order that products of matrices and copies of blocks want: rows of 128 bytes, swizzled."""
    transforms = (plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def transposed(ref):
    """The view of a block with rows and columns exchanged."""
    # A method since jax 0.12, a function before.
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def load(ref, layout):
    """From memory into registers."""
    return plgpu.load(ref, layout=layout, optimized=False)


def store(x, ref):
    """From registers into global memory."""
    if hasattr(plgpu, "store"):  # jax 0.12, where an assignment is for what a row of 32 bytes divides
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def keep(x, ref, block):
    """From registers into global memory: by way of a block in shared memory, where that has the same numbers."""
    if ref.dtype != block.dtype:
        store(x.astype(ref.dtype), ref)
        return
    block[...] = x.astype(ref.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(block, ref)


def filled(shape: tuple[int, ...], value: float, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def over_columns(x_R, width: int):
    """(rows,) as (rows, width)."""
    return lax.broadcast_in_dim(x_R, (x_R.shape[0], width), [0])


def over_rows(x_C, height: int):
    """(columns,) as (height, columns)."""
    return lax.broadcast_in_dim(x_C, (height, x_C.shape[0]), [1])


class Products(NamedTuple):
    """Products of matrices of 16-bit numbers with sums in float32.

    Attributes:
      interpreted: the interpreter of jax 0.12 knows products of what is in shared memory, in sums that begin at 0; the
        others are computed beside it, to the same values.
    """

    interpreted: bool

    def fresh(self, a, b, meanwhile: Callable = lambda: None):
        """a b; `meanwhile` is done while it is computed."""

        def multiply(sums):
            plgpu.wgmma(sums, a, b)
            meanwhile()
            return sums[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))

    def added(self, sums, a, b):
        """sums + a b, `a` in registers."""
        if self.interpreted:
            sums += jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))
            plgpu.commit_smem()  # a product of matrices reads in the order of the copies, which this read did not
            return sums
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(sums))

    def both(self, first, second, use: Callable, sums=None, meanwhile: Callable = lambda: None):
        """use(a b, then) for first = (a, b) and second = (c, d), where then() gives sums + c d.

        Both are asked for at once, then `meanwhile` is done; what `use` does before it calls then(), it does while the
        second is computed. `c` may be in registers, where there are sums.
        """
        if self.interpreted:
            then = functools.partial(*((self.fresh,) if sums is None else (self.added, sums)), *second)
            return use(self.fresh(*first, meanwhile), then)

        def multiply(one, other):
            if sums is not None:
                other[...] = sums
            plgpu.wgmma(one, *first)
            plgpu.wgmma(other, *second)
            meanwhile()
            return use(plgpu.wgmma_accumulator_load(one, wait_n=1), lambda: other[...])

        shapes = ((a.shape[0], b.shape[1]) for a, b in (first, second))
        return pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def all_added(self, sums: list, factors: list):
        """Each of `sums` with the product of its factors (a, b), `a` in registers, all asked for at once."""
        if self.interpreted:
            return [self.added(x, *pair) for x, pair in zip(sums, factors, strict=True)]

        def multiply(*refs):
            for ref, x in zip(refs, sums, strict=True):
                ref[...] = x
            for ref, pair in zip(refs, factors, strict=True):
                plgpu.wgmma(ref, *pair)
            return [ref[...] for ref in refs]

        return pl.run_scoped(multiply, *(plgpu.ACC(x.shape, jnp.float32) for x in sums))

    def summed(self, *factors):
        """The sum of a b over factors (a, b)."""
        if self.interpreted:
            return sum(jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32)) for a, b in factors)

        def multiply(sums):
            for a, b in factors:
                plgpu.wgmma(sums, a, b)
            return sums[...]

        return pl.run_scoped(multiply, plgpu.ACC((factors[0][0].shape[0], factors[0][1].shape[1]), jnp.float32))

    def add_to(self, ref, block):
        """Adds a block in shared memory to what is in global memory, and goes on before that is done."""
        if self.interpreted:
            store(load(ref, plgpu.Layout.WGMMA) + block[...], ref)
        else:
            plgpu.copy_smem_to_gmem(block, ref, reduction_op="add")


class Language(NamedTuple):
    """What is made of the products of queries and keys.

    Attributes:
      names: fields of the Tokens that mask and score read, in the order in which they are stacked.
      tree: structure of the score, whose leaves are its parameters.
      plain: whether the score leaves logits as they are.
      reads: fields that the score reads.
      arrays: the table of gpu/rows.py, fields of queries (B, names, T) and of keys (B, names, S), and the parameters
        (H,) of a score that is not plain: or, in a kernel, references to them.
    """

    mask: Mask
    scale: float
    names: list[str]
    tree: jax.tree_util.PyTreeDef
    plain: bool
    reads: frozenset[str]
    arrays: tuple[Any, ...]

    @property
    def table(self):
        return self.arrays[0]

    def parameters(self, head) -> list:
        return [ref[head] for ref in self.arrays[3:]]

    @property
    def factor(self) -> float:
        """What logits are to be multiplied by to be powers of two: that costs nothing where it is part of a sum."""
        return self.scale * LOG2E if self.plain and self.scale > 0 else 1.0

    def beside(self, batch, starts: tuple, shape: tuple[int, int], masked: bool, keys_are_rows: bool = False):
        """The fields that a block needs, of queries and of keys, each spread over the block."""
        sides = []
        for fields, start, rows in zip(self.arrays[1:3], starts, (not keys_are_rows, keys_are_rows), strict=True):
            length, layout = (shape[0], ACROSS) if rows else (shape[1], DOWN)
            wanted = [n for n in self.names if (masked and n in self.mask.fields) or n in self.reads]
            given = {n: load(fields.at[batch, self.names.index(n), pl.ds(start, length)], layout) for n in wanted}
            sides.append({n: over_columns(x, shape[1]) if rows else over_rows(x, shape[0]) for n, x in given.items()})
        return sides

    def logits(self, s, parameters: list, query: dict, key: dict, masked: bool):
        """(t, w): logits which times `factor` are powers of two, -inf where hidden, and weights or None."""
        weight = None
        if not self.plain:
            (s, weight), _ = self.pulled(s, parameters, query, key)
        elif self.scale <= 0:
            s = self.scale * LOG2E * s
        return (self.shown(s, query, key) if masked else s), weight

    def shown(self, s, query: dict, key: dict):
        """s where the mask shows the pair, else -inf."""
        if not self.mask.fields:  # a formula that reads nothing shows all pairs or none; NaN stays
            return jnp.minimum(s, jnp.where(self.mask.tile({None: 0}, {None: 0}), jnp.inf, -jnp.inf))
        zeros = jnp.zeros(s.shape, jnp.int32)
        return self.mask.select({None: zeros, **query}, {None: zeros, **key}, s, -jnp.inf)

    def pulled(self, s, parameters: list, query: dict, key: dict):
        """((t, w) of a score, nothing hidden, and what takes their cotangents to those of s scaled and parameters)."""
        # Each parameter is spread over the block, so that its gradient comes back as one number a pair.
        given = self.scale * s, [jnp.full(s.shape, x) for x in parameters]

        def apply(s, parameters, query, key):
            return scored(self.tree.unflatten(parameters), s, query, key)

        def pull(cotangents):
            def back(given, query, key, cotangents):
                return jax.vjp(lambda *given: apply(*given, query, key), *given)[1](cotangents)

            return in_known_words(back, given, query, key, cotangents)

        return in_known_words(apply, *given, query, key), pull
