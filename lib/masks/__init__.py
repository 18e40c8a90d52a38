"""One mask algebra: who sees whom, as a formula over the Tokens of a query and of a key.

A formula is built from four atoms (difference, table, modulo, switch), closed under `&`, `|` and `~`. It has three
readings:

  dense    the (batch, T, S) array of booleans: the oracle, and what small problems print
  tile     the same booleans for one tile, from the query column and the key row of each field it reads
  verdict  for a whole block, from summaries of each field: NONE (no pair is visible), ALL, or MIXED. Kleene logic: a
           verdict of NONE or ALL is always right, MIXED may be pessimistic

The meaning depends on the Tokens alone, hence for any orders P of the queries and R of the keys
mask(q[P], k[R]) == mask(q, k)[P][:, R]: a permuted layout needs no new masks.

A switch may differ from head to head. Such a formula has a number of `heads`, and its readings are those of `head(h)`,
the formula of one head.

Formulas are immutable, compare and hash by structure (so they can be static arguments of jit), and print as text that
`parse` reads back.
"""

from striate.lib.masks.algebra import ALL, MIXED, NONE, And, Constant, Mask, Not
from striate.lib.masks.atoms import Difference, Modulo, Switch, Table
from striate.lib.masks.formulas import (
    after,
    at_least,
    causal,
    difference,
    everything,
    key,
    modulo,
    nothing,
    prefix,
    query,
    same,
    sink,
    switch,
    table,
    window,
)
from striate.lib.masks.text import parse

__all__ = [
    "ALL",
    "MIXED",
    "NONE",
    "And",
    "Constant",
    "Difference",
    "Mask",
    "Modulo",
    "Not",
    "Switch",
    "Table",
    "after",
    "at_least",
    "causal",
    "difference",
    "everything",
    "key",
    "modulo",
    "nothing",
    "parse",
    "prefix",
    "query",
    "same",
    "sink",
    "switch",
    "table",
    "window",
]
