"""Work, counted in tiles: the verdicts of all pairs of tiles, and who computes them at which step of a ring."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np

from striate.lib.errors import UserError
from striate.lib.masks import ALL, MIXED, Mask
from striate.lib.tokens import Tokens

CHUNK = 1 << 21  # pairs of tiles whose verdicts are computed at once: tens of megabytes


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
    def busiest(self) -> int:
        """Tiles of the device that has most: what is waited for where devices do not wait at every step."""
        return int(self.live.sum(axis=0).max())

    @property
    def ideal(self) -> float:
        """Tiles per device if the live tiles were spread evenly."""
        return self.live.sum() / self.live.shape[1]

    @property
    def balance(self) -> float:
        """ideal / critical_path, 1.0 at best."""
        return self.ideal / max(self.critical_path, 1)

    @property
    def offsets(self) -> tuple[int, ...]:
        """The steps at which some device has work: the others need no hop."""
        return tuple(np.flatnonzero(self.live.any(axis=1)).tolist())


@dataclass(frozen=True, eq=False)
class TileMap:
    """The verdicts of all pairs of tiles, in the order that the Tokens were given in.

    An order that moves whole tiles makes the same verdicts in other places (`Layout.places`), so that one map serves
    many layouts.

    Attributes:
      mixed, full: in how many rows of the batch, times heads, a pair of tiles is MIXED, or ALL; unsigned integers
        (query tiles, key tiles).
      rows: rows of the batch, times heads.
    """

    mixed: np.ndarray
    full: np.ndarray
    rows: int

    @classmethod
    def of(cls, mask: Mask, tokens: Tokens, tile: tuple[int, int] = (512, 512), shards: int = 1) -> TileMap:
        """From summaries of the tiles; the last tile of each of `shards` equal runs is shorter where it has to be.

        Arguments are those of `Layout.work`, but for the order of the Tokens, which is any.

        Raises:
          UserError: Tokens that are known only as a program runs, or that lack a field of the formula.
        """
        tokens = on_host(tokens)
        query_blocks, key_blocks = _blocks(tokens.as_queries(), shards, tile[0]), _blocks(tokens, shards, tile[1])
        (batch, queries, _), keys = query_blocks["position"].shape, key_blocks["position"].shape[1]
        rows = batch * (mask.heads or 1)
        mixed, full = np.zeros((2, queries, keys), np.min_scalar_type(rows))
        for formula, heads in mask.by_formula(mask.heads or 1).items():
            formula.check(tokens, tokens)
            query, key = formula.query_summaries(query_blocks), formula.key_summaries(key_blocks)
            key = {read: x[:, None, :] for read, x in key.items()}
            height = max(CHUNK // (batch * keys), 1)
            for some in (slice(start, min(start + height, queries)) for start in range(0, queries, height)):
                verdict = formula.verdict({read: x[:, some, None] for read, x in query.items()}, key)
                verdict = np.broadcast_to(verdict, (batch, some.stop - some.start, keys))
                for counts, kind in ((mixed, MIXED), (full, ALL)):
                    counts[some] += (len(heads) * (verdict == kind).sum(0)).astype(counts.dtype)
        return cls(mixed, full, rows)

    @cached_property
    def live(self) -> np.ndarray:
        """MIXED or ALL: what is computed."""
        return self.mixed + self.full

    def work(self, shards: int, places: np.ndarray | None = None) -> Work:
        """The work of `shards` equal runs of the tiles, taken in the order `places` of square tiles, or as they are."""
        queries, keys = (np.arange(n) if places is None else places for n in self.mixed.shape)
        queries, keys = queries.reshape(shards, -1), keys.reshape(shards, -1)
        mixed, full = (by_shard(counts, queries, keys) for counts in (self.mixed, self.full))
        none = self.rows * queries.shape[1] * keys.shape[1] - mixed - full
        return Work(np.stack([none, mixed, full], axis=-1)[at_step(shards)])


def on_host(tokens: Tokens) -> Tokens:
    """The Tokens as numpy arrays.

    Raises:
      UserError: Tokens that are known only as a program runs.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tokens)):
        raise UserError("Work is counted on the host, and these Tokens are traced: count it outside of jax.jit.")
    return jax.tree.map(np.asarray, tokens)


def by_shard(counts: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """int (query shards, key shards): the sums of `counts` over the tiles of either, given as (shards, tiles)."""
    of_queries = np.stack([counts[tiles].sum(0, dtype=np.int64) for tiles in queries])
    return of_queries[:, keys].sum(-1)


def at_step(shards: int) -> tuple[np.ndarray, np.ndarray]:
    """An index from (query shard, key shard) to (step, device): device d has the keys of shard d - s at step s."""
    device = np.arange(shards)
    return np.broadcast_to(device, (shards, shards)), (device - device[:, None]) % shards


def _blocks(tokens: Tokens, shards: int, tile: int) -> dict[str, np.ndarray]:
    """Every field as (batch, tiles, tile); the last tile of a shard, where shorter, repeats its last token."""
    blocks = {}
    for name, value in tokens.fields().items():
        value = value.reshape(value.shape[0], shards, -1)
        value = np.pad(value, ((0, 0), (0, 0), (0, -value.shape[-1] % tile)), mode="edge")
        blocks[name] = value.reshape(value.shape[0], -1, tile)
    return blocks
