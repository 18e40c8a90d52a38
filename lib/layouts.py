"""Layouts: which token lives where when the sequence is cut over shards, and how much work that gives each of them.

A layout reorders the natural sequence so that shard d owns the d-th of `shards` equal runs of the permuted one.
Masks and positions read Tokens, which are permuted along, so that every layout computes the same function; what
differs is who has work when the keys travel around a ring (shard i holds the keys of shard (i - s) mod N at step s).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np

from striate.lib.errors import UserError
from striate.lib.masks import ALL, MIXED, NONE, Mask
from striate.lib.tokens import Tokens


class Layout:
    """An order of the tokens over `shards` sequence shards."""

    shards: int

    def __post_init__(self):
        if min(vars(self).values()) < 1:
            raise UserError(f"{self} cannot be: its numbers are at least 1.")

    def order(self, length: int) -> np.ndarray:
        """int (length,): permuted[i] = natural[order[i]]."""
        raise NotImplementedError

    @property
    def unit(self) -> int:
        """The length has to be a multiple of this."""
        raise NotImplementedError

    def check(self, length: int) -> None:
        """Raises UserError when the length cannot be laid out."""
        if length % self.unit:
            down, up = length - length % self.unit, length - length % self.unit + self.unit
            raise UserError(
                f"{self} needs a length that is a multiple of {self.unit}, got {length}: "
                f"use {f'{down} or ' if down else ''}{up}, or another layout."
            )

    def permute(self, tree, axis: int = 1):
        """Natural order to layout order, on one axis of every array of the tree."""
        return self._take(tree, axis, self.order)

    def restore(self, tree, axis: int = 1):
        """Layout order back to natural order: restore(permute(x)) == x."""
        return self._take(tree, axis, lambda length: np.argsort(self.order(length)))

    def _take(self, tree, axis, order):
        return jax.tree.map(lambda x: x.take(order(x.shape[axis]), axis=axis), tree)

    def work(self, mask: Mask, tokens: Tokens, tile: tuple[int, int] = (512, 512)) -> Work:
        """Tiles of each verdict for every ring step and device, predicted from block summaries on the host.

        Args:
          mask: the formula; the heads of one with switches per head are added up.
          tokens: concrete Tokens of the self-attention, natural order; the rows of the batch are added up.
          tile: (query, key) tile lengths; a shard that is no multiple of them ends in shorter tiles.
        """
        tokens = self.permute(jax.tree.map(np.asarray, tokens))
        mask.check(tokens, tokens)
        if mask.heads:
            return Work(sum(self._counts(mask.head(head), tokens, tile) for head in range(mask.heads)))
        return Work(self._counts(mask, tokens, tile))

    def _counts(self, mask: Mask, tokens: Tokens, tile: tuple[int, int]) -> np.ndarray:
        """int (steps, devices, 3), as in Work, of Tokens in the order of the layout."""
        query_blocks = _blocks(tokens.as_queries(), self.shards, tile[0])
        key_blocks = _blocks(tokens, self.shards, tile[1])
        shape = (tokens.shape[0], query_blocks["position"].shape[2], key_blocks["position"].shape[2])
        query, key = mask.query_summaries(query_blocks), mask.key_summaries(key_blocks)
        counts = np.zeros((self.shards, self.shards, 3), np.int64)
        for device in range(self.shards):
            q = {read: x[:, device, :, None] for read, x in query.items()}
            for step in range(self.shards):
                born = (device - step) % self.shards
                k = {read: x[:, born, None, :] for read, x in key.items()}
                verdict = np.broadcast_to(mask.verdict(q, k), shape)
                counts[step, device] = [(verdict == kind).sum() for kind in (NONE, MIXED, ALL)]
        return counts


@dataclass(frozen=True)
class Striped(Layout):
    """Stripes of `stripe` tokens are dealt to the shards in turn.

    stripe = 1 is Striped Attention (Brandon et al. 2023, section 3); stripe = one kernel tile is block-cyclic and keeps
    empty tiles empty; stripe = length / shards is the contiguous order of Ring Attention.
    """

    shards: int
    stripe: int = 1

    @property
    def unit(self) -> int:
        return self.shards * self.stripe

    def order(self, length: int) -> np.ndarray:
        self.check(length)
        return np.arange(length).reshape(-1, self.shards, self.stripe).swapaxes(0, 1).reshape(-1)


@dataclass(frozen=True)
class Contiguous(Layout):
    """Shard d owns the d-th run of the natural order: Ring Attention (Liu et al. 2023)."""

    shards: int

    @property
    def unit(self) -> int:
        return self.shards

    def order(self, length: int) -> np.ndarray:
        self.check(length)
        return np.arange(length)


@dataclass(frozen=True)
class ZigZag(Layout):
    """2N chunks; shard r owns chunks r and 2N - 1 - r: exactly ideal for causal, and two contiguous runs per device."""

    shards: int

    @property
    def unit(self) -> int:
        return 2 * self.shards

    def order(self, length: int) -> np.ndarray:
        self.check(length)
        chunks = np.arange(length).reshape(2 * self.shards, -1)
        return np.stack([chunks[: self.shards], chunks[: self.shards - 1 : -1]], axis=1).reshape(-1)


@dataclass(frozen=True)
class Work:
    """Predicted work: counts[step, device, verdict] of tiles, the verdicts in the order NONE, MIXED, ALL."""

    counts: np.ndarray

    @cached_property
    def live(self) -> np.ndarray:
        """Tiles that are computed, [step, device]."""
        return self.counts[..., 1:].sum(-1)

    @property
    def critical_path(self) -> int:
        """Tiles on the critical path of the ring: each step waits for its busiest device."""
        return int(self.live.max(axis=1).sum())

    @property
    def ideal(self) -> float:
        """Tiles per device if the live tiles were spread evenly."""
        return self.live.sum() / self.live.shape[1]

    @property
    def balance(self) -> float:
        """ideal / critical_path, 1.0 at best."""
        return self.ideal / max(self.critical_path, 1)


def _blocks(tokens: Tokens, shards: int, tile: int) -> dict[str, np.ndarray]:
    """Every field as (batch, shards, tiles, tile); a last shorter tile repeats its last token."""
    blocks = {}
    for name, value in tokens.fields().items():
        value = value.reshape(value.shape[0], shards, -1)
        value = np.pad(value, ((0, 0), (0, 0), (0, -value.shape[-1] % tile)), mode="edge")
        blocks[name] = value.reshape(value.shape[0], shards, -1, tile)
    return blocks
