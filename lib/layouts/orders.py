"""The orders: a layout permutes, inverts, and says what work it makes."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from striate.lib.errors import UserError
from striate.lib.layouts.work import TileMap, Work, on_host
from striate.lib.masks import Mask
from striate.lib.tokens import Tokens


class Layout:
    """An order of the tokens over `shards` sequence shards."""

    shards: int

    def __post_init__(self):
        if min(value for value in vars(self).values() if isinstance(value, int)) < 1:
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

    def places(self, length: int, tile: int) -> np.ndarray | None:
        """int (length / tile,): the natural tiles in the order of the layout; None where it cuts through a tile."""
        if length % (self.shards * tile):
            return None
        order = self.order(length).reshape(-1, tile)
        whole = (order[:, 0] % tile == 0).all() and (order == order[:, :1] + np.arange(tile)).all()
        return order[:, 0] // tile if whole else None

    def work(self, mask: Mask, tokens: Tokens, tile: tuple[int, int] = (512, 512)) -> Work:
        """Tiles of each verdict for every ring step and device, predicted from block summaries on the host.

        Args:
          mask: the formula; the heads of one with switches per head are added up.
          tokens: concrete Tokens of the self-attention, natural order; the rows of the batch are added up.
          tile: (query, key) tile lengths; a shard that is no multiple of them ends in shorter tiles.
        """
        return TileMap.of(mask, self.permute(on_host(tokens)), tile, self.shards).work(self.shards)


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
class Dealt(Layout):
    """Pieces of the natural order in any order.

    The natural order is cut at `starts`, and its pieces follow each other as `starts` names them. `balanced` deals
    tiles so, for masks that stripes do not balance; the work is even for the Tokens that it was made for.
    """

    shards: int
    starts: tuple[int, ...]

    def __post_init__(self):
        super().__post_init__()
        if not self.starts or min(self.starts) != 0 or len(set(self.starts)) < len(self.starts):
            raise UserError(f"{self} cannot be: its pieces start at token 0 and at further ones, each named once.")

    @property
    def unit(self) -> int:
        return self.shards

    def check(self, length: int) -> None:
        super().check(length)
        if length <= max(self.starts):
            raise UserError(
                f"{self} needs a length of more than {max(self.starts)} tokens, where its last piece starts, and got "
                f"{length}: make it again for these Tokens."
            )

    def order(self, length: int) -> np.ndarray:
        self.check(length)
        starts = np.array(self.starts)
        ends = np.append(np.sort(starts), length)
        lengths = ends[np.searchsorted(ends, starts, side="right")] - starts
        return np.repeat(starts - np.append(0, lengths.cumsum()[:-1]), lengths) + np.arange(length)

    def __repr__(self) -> str:
        return f"Dealt(shards={self.shards}, {len(self.starts)} pieces)"
