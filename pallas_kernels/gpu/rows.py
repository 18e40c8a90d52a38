"""Which blocks a kernel goes through: for each row of blocks a list of those that have work, the longest rows first.

A row is what stays while a result is gathered (a block of queries, or of keys), counted over the batch; columns are the
blocks that pass by. Those of a row that need no mask come first, so that a kernel is two loops, one of them without
mask arithmetic. Thread blocks start in the order of the grid: with the longest rows first the last ones to end are
short. The verdicts come from the Tokens inside the program, hence lists may be traced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from striate.lib.masks import ALL, NONE

ROW, WHOLE, LIVE, COLUMNS = range(4)  # b * rows + row; blocks without mask; blocks with work; from here on, which


def live_rows(verdict_BRC: jax.Array) -> jax.Array:
    """int32 (B R, COLUMNS + C): for each row in turn ROW, WHOLE, LIVE, then the columns of its blocks."""
    batch, rows, columns = verdict_BRC.shape
    verdict = verdict_BRC.reshape(-1, columns)
    whole, live = verdict == ALL, verdict != NONE
    column = jnp.argsort(jnp.where(whole, 0, jnp.where(live, 1, 2)), axis=1, stable=True).astype(jnp.int32)
    counts = [x.sum(1, dtype=jnp.int32) for x in (whole, live)]
    numbers = [jnp.arange(batch * rows, dtype=jnp.int32), *counts]
    table = jnp.concatenate([jnp.stack(numbers, axis=1), column], axis=1)
    return table[jnp.argsort(-counts[1], stable=True)]
