"""The lists of live blocks that the grids of the kernels walk: a block that a mask hides costs no step and no copy.

A step is two numbers that the scalar core reads ahead: a row, and a code of a column and of what there is to do. Rows
are what stays while a result is gathered (blocks of queries forward, blocks of keys backward), counted over the batch;
columns are the blocks that pass by. The verdicts come from the Tokens inside the program, hence lists may be traced.

The memory of the scalar core is small, and a million tokens have a million blocks: rows are taken in segments, one
call of the kernel each, whose lists are never longer than `LONGEST`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from striate.lib.masks import MIXED, NONE

LONGEST = 2**15

FIRST, LIVE, MASKED, LAST = 1, 2, 4, 8  # first or last step of its row; has work; needs the mask
COLUMN = 16


class Steps(NamedTuple):
    """For every segment of rows."""

    row: jax.Array  # int32 (segments, steps): b * rows + row
    code: jax.Array  # int32 (segments, steps): column * COLUMN + flags
    count: jax.Array  # int32 (segments,): how many of these steps there are, at least one


def live_steps(verdict_BRC: jax.Array, share: int = 1) -> Steps:
    """The blocks that have work, row by row. A segment without any has one step, without work, at its first row.

    Lists are `share` times as short, where a step takes as many more numbers.
    """
    batch, rows, columns = verdict_BRC.shape
    size = max(min(LONGEST // share // columns, batch * rows), 1)
    segments = -(-batch * rows // size)
    padding = ((0, segments * size - batch * rows), (0, 0))
    verdict = jnp.pad(verdict_BRC.reshape(-1, columns), padding, constant_values=NONE).reshape(segments, size, columns)

    def of_segment(verdict, first_row):
        live = verdict.reshape(-1) != NONE
        count = jnp.maximum(live.sum(dtype=jnp.int32), 1)
        index = jnp.nonzero(live, size=live.size, fill_value=0)[0].astype(jnp.int32)
        row, column = index // columns, index % columns
        kind = verdict.reshape(-1)[index]
        place = jnp.arange(live.size)
        first = jnp.roll(row, 1) != row
        last = (jnp.roll(row, -1) != row) | (place == count - 1)
        flags = FIRST * (first | (place == 0)) + LIVE * (kind != NONE) + MASKED * (kind == MIXED) + LAST * last
        return first_row + row, COLUMN * column + flags.astype(jnp.int32), count

    return Steps(*jax.vmap(of_segment)(verdict, size * jnp.arange(segments, dtype=jnp.int32)))


def over_segments(steps: Steps, call, carry):
    """call(row, code, count, carry) for every segment in turn."""
    if steps.count.size == 1:
        return call(steps.row[0], steps.code[0], steps.count[0], carry)
    return jax.lax.fori_loop(
        0, steps.count.size, lambda i, carry: call(steps.row[i], steps.code[i], steps.count[i], carry), carry
    )
