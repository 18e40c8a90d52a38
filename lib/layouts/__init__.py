"""Layouts: which token lives where when the sequence is cut over shards, and how much work that gives each of them.

A layout reorders the natural sequence so that shard d owns the d-th of `shards` equal runs of the permuted one.
Masks and positions read Tokens, which are permuted along, so that every layout computes the same function; what
differs is who has work when the keys travel around a ring (shard i holds the keys of shard (i - s) mod N at step s).
Work is counted in tiles on the host, before anything compiles, and `balanced` deals tiles by what it counted.
"""

from striate.lib.layouts.balance import balanced
from striate.lib.layouts.orders import Contiguous, Dealt, Layout, Striped, ZigZag
from striate.lib.layouts.work import TileMap, Work

__all__ = [
    "Contiguous",
    "Dealt",
    "Layout",
    "Striped",
    "TileMap",
    "Work",
    "ZigZag",
    "balanced",
]
