"""The lists of live blocks that the grids of the kernels walk: a block that a mask hides costs no step and no copy.

A step is two numbers that the scalar core reads ahead: a row, and a code of a column and of what there is to do, down
to the quarters of a block that the mask cuts. Rows are what stays while a result is gathered (blocks of queries
forward, blocks of keys backward), counted over the batch; columns are the blocks that pass by. The verdicts come from
the Tokens inside the program, hence lists may be traced.

The memory of the scalar core is small, and a million tokens have a million blocks: rows are taken in segments, one
call of the kernel each, whose lists are never longer than `LONGEST`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from striate.lib.masks import ALL, MIXED, NONE
from striate.lib.tiles import Tiled
from striate.pallas_kernels.tpu.chips import LANES

LONGEST = 2**15

FIRST, LIVE, MASKED, LAST = 1, 2, 4, 8  # first or last step of its row; has work; needs the mask
QUARTER = 16  # from here on two bits for the verdict of each quarter
COLUMN = QUARTER * 4**4


class Steps(NamedTuple):
    """For every segment of rows."""

    row: jax.Array  # int32 (segments, steps): b * rows + row
    code: jax.Array  # int32 (segments, steps): column * COLUMN + flags + verdicts of the quarters
    count: jax.Array  # int32 (segments,): how many of these steps there are, at least one


def halves(length: int) -> list[slice]:
    """Both halves of a side of a block, where these are of whole lanes; else all of it."""
    half = length // 2 if length % (2 * LANES) == 0 else length
    return [slice(start, start + half) for start in range(0, length, half)]


def quarters(kernel: Tiled, query_fields, key_fields, transposed: bool = False) -> jax.Array:
    """Verdicts (B, R, C, n) of the quarters of every block, rows before columns. Fields are as in `Tiled.sides`.

    Rows are blocks of queries, or, transposed, of keys.
    """
    cuts = [len(halves(side)) for side in kernel.tile]
    tile = tuple(side // cut for side, cut in zip(kernel.tile, cuts, strict=True))
    verdict = dataclasses.replace(kernel, tile=tile).verdicts(query_fields, key_fields)
    verdict, (a, b) = (verdict.swapaxes(1, 2), cuts[::-1]) if transposed else (verdict, cuts)
    batch, rows, columns = verdict.shape
    return verdict.reshape(batch, rows // a, a, columns // b, b).swapaxes(2, 3).reshape(batch, rows // a, -1, a * b)


def live_steps(verdict_BRCN: jax.Array, share: int = 1) -> Steps:
    """The blocks that have work, row by row. A segment without any has one step, without work, at its first row.

    Lists are `share` times as short, where a step takes as many more numbers.
    """
    batch, rows, columns, parts = verdict_BRCN.shape
    kinds = ((verdict_BRCN.astype(jnp.int32) - NONE) * 4 ** jnp.arange(parts).reshape(1, 1, 1, -1)).sum(-1)
    least, most = verdict_BRCN.min(-1), verdict_BRCN.max(-1)
    verdict_BRC = jnp.where(least == most, least, MIXED)
    size = max(min(LONGEST // share // columns, batch * rows), 1)
    segments = -(-batch * rows // size)
    padding = ((0, segments * size - batch * rows), (0, 0))
    verdict = jnp.pad(verdict_BRC.reshape(-1, columns), padding, constant_values=NONE).reshape(segments, size, columns)
    kinds = jnp.pad(kinds.reshape(-1, columns), padding).reshape(verdict.shape)

    def of_segment(verdict, kinds, first_row):
        live = verdict.reshape(-1) != NONE
        count = jnp.maximum(live.sum(dtype=jnp.int32), 1)
        index = jnp.nonzero(live, size=live.size, fill_value=0)[0].astype(jnp.int32)
        row, column = index // columns, index % columns
        kind = verdict.reshape(-1)[index]
        place = jnp.arange(live.size)
        first = jnp.roll(row, 1) != row
        last = (jnp.roll(row, -1) != row) | (place == count - 1)
        flags = FIRST * (first | (place == 0)) + LIVE * (kind != NONE) + MASKED * (kind == MIXED) + LAST * last
        flags = flags.astype(jnp.int32) + QUARTER * kinds.reshape(-1)[index]
        return first_row + row, COLUMN * column + flags, count

    return Steps(*jax.vmap(of_segment)(verdict, kinds, size * jnp.arange(segments, dtype=jnp.int32)))


def bodies(flags, rows: int, columns: int) -> Iterator[tuple[jax.Array, slice, slice, bool]]:
    """What a step may have to do: (whether it has to, rows, columns, whether they need the mask).

    A block that needs the mask is done quarter by quarter, so that those which are hidden take no time and those which
    are not take no mask.
    """
    yield flags & (LIVE | MASKED) == LIVE, slice(0, rows), slice(0, columns), False
    places = list(itertools.product(halves(rows), halves(columns)))
    for number, (row, column) in enumerate(places):
        kind = flags // (QUARTER * 4**number) % 4 + NONE
        if len(places) > 1:
            yield (flags & MASKED != 0) & (kind == ALL), row, column, False
        yield (flags & MASKED != 0) & (kind == MIXED), row, column, True


def over_segments(steps: Steps, call, carry):
    """call(row, code, count, carry) for every segment in turn."""
    if steps.count.size == 1:
        return call(steps.row[0], steps.code[0], steps.count[0], carry)
    return jax.lax.fori_loop(
        0, steps.count.size, lambda i, carry: call(steps.row[i], steps.code[i], steps.count[i], carry), carry
    )
