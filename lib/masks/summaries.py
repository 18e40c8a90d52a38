"""What a verdict knows of a block: reductions of the fields that a formula reads over the tokens of the block.

A read names one, as (reduction, field, *parameters):

  ("least", field), ("greatest", field)         the extent of the field
  ("classes", field)                            int32, bit c is set where a token is of class c, 0 <= c < BITS
  ("residues", field, divisor, remainder)       int32, bit r is set where (x - remainder) mod divisor = r for a token x
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

BITS = 32
"""Bits of a summary, hence the most classes of a table and the greatest divisor with residue bits."""

Read = tuple


def reads(field: str | None, *reductions: tuple) -> frozenset[Read]:
    """The reads of one field; a field of None, the constant 0, needs none."""
    return frozenset() if field is None else frozenset((name, field, *rest) for name, *rest in reductions)


def summarise(blocks: Mapping, wanted: frozenset[Read]) -> dict[Read, np.ndarray]:
    """Every read of blocks (..., n) as an array (...), numpy or JAX as the field is."""
    return {(name, field, *rest): _REDUCTIONS[name](blocks[field], *rest) for name, field, *rest in wanted}


def summary(summaries: Mapping, field: str | None, reduction: str, *parameters: int):
    """One summary out of those of `summarise`; a field of None is the constant 0."""
    if field is None:
        return _REDUCTIONS[reduction](np.zeros(1, np.int32), *parameters)
    return summaries[reduction, field, *parameters]


def value(fields: Mapping, field: str | None):
    """The values of one field; a field of None is the constant 0, in the shape that `fields` has for it, if any."""
    return fields.get(None, np.int32(0)) if field is None else fields[field]


def where(condition, x, y):
    """`where` of numpy or of JAX, as the condition is."""
    return condition.__array_namespace__().where(condition, x, y)


def bit(x, size: int = BITS):
    """The integer whose bit x is set; 0 where x is not in 0 .. size - 1."""
    inside = (x >= 0) & (x < size)
    return where(inside, np.int32(1) << where(inside, x, 0), 0)


def signed(bits: int) -> np.int32:
    """The int32 of the same 32 bits."""
    return np.uint32(bits).astype(np.int32)


def _any_bit(x):
    return x.__array_namespace__().bitwise_or.reduce(bit(x), axis=-1).astype(np.int32)


_REDUCTIONS = {
    "least": lambda x: x.min(-1),
    "greatest": lambda x: x.max(-1),
    "classes": _any_bit,
    "residues": lambda x, divisor, remainder: _any_bit((x - remainder) % divisor),
}
