"""Orders that are searched for: tiles dealt until the work is even."""

from __future__ import annotations

import heapq

import numpy as np

from striate.lib.layouts.orders import Dealt, Striped
from striate.lib.layouts.work import TileMap, at_step, by_shard
from striate.lib.masks import Mask
from striate.lib.tokens import Tokens

# Of the search for a shorter path. Softness is in parts of the mean work of a step.
FIRST_SOFTNESS, DECAY, LAST_SOFTNESS = 0.3, 0.7, 0.01
ROUNDS = 400
PAIRS = 8  # of shards that a round tries, per shard


def balanced(mask: Mask, tokens: Tokens, shards: int, tile: int = 512, lockstep: bool = True) -> Dealt:
    """Tiles dealt to the shards, equally many to each, so that the work is even: for masks that stripes do not balance.

    Args:
      mask, tokens: as in `Layout.work`; the rows of the batch share one order.
      tile: tokens of a tile.
      lockstep: the shards wait for each other at every step of a ring, so that the critical path counts. Else the total
        of every shard does.

    Raises:
      UserError: a length that is no multiple of shards x tile.
    """
    Striped(shards, tile).check(tokens.shape[1])
    return deal(TileMap.of(mask, tokens, (tile, tile)).live, shards, tile, lockstep)


def deal(live: np.ndarray, shards: int, tile: int, lockstep: bool = True) -> Dealt:
    """`balanced`, from the live tiles (query tiles, key tiles) of a TileMap in natural order.

    Totals are evened out longest first: the next tile, the one with most work, goes to the shard that has least (Graham
    1969). A critical path is that of stripes of one tile, shortened by swaps. The best of these and of all stripes of
    whole tiles is taken.
    """
    own = len(live) // shards
    widths = (width for width in range(1, own + 1) if own % width == 0)
    stripes = [np.arange(len(live)).reshape(-1, shards, n).swapaxes(0, 1).reshape(shards, own) for n in widths]
    orders = [_longest_first(live.sum(axis=1, dtype=np.int64), shards), *stripes]
    orders += [_Dealing(live, stripes[0]).shorten()] if lockstep else []
    cost = _path if lockstep else _greatest_total
    places = min(orders, key=lambda order: cost(by_shard(live, order, order)))
    return Dealt(shards, tuple((np.sort(places).reshape(-1) * tile).tolist()))


def _longest_first(work: np.ndarray, shards: int) -> np.ndarray:
    """Tiles (shards, tiles of a shard): each, most work first, goes to the shard with least work that is not full."""
    dealt: list[list[int]] = [[] for _ in range(shards)]
    open_shards = [(0, shard) for shard in range(shards)]
    for tile in np.argsort(-work, kind="stable").tolist():
        load, shard = heapq.heappop(open_shards)
        dealt[shard].append(tile)
        if len(dealt[shard]) < len(work) // shards:
            heapq.heappush(open_shards, (load + int(work[tile]), shard))
    return np.array(dealt)


class _Dealing:
    """Tiles dealt to shards, with the sums that a swap changes.

    With W[d, e] the live tiles of queries of shard d and keys of shard e, met at step d - e of the ring, the critical
    path is the sum over the steps of the greatest W. To see which way is down, every maximum is softened to
    t log sum exp(W / t). With g[d, e] the gradient of that path, a tile x on shard d costs

        sum_e g[d, e] seen[e, x] + g[e, d] seers[e, x]

    where seen[e, x] counts the live tiles of queries x with keys of e, seers[e, x] those of queries of e with keys x.
    """

    def __init__(self, live: np.ndarray, places: np.ndarray):
        self.live, self.places = live, places.copy()  # (query tiles, key tiles), (shards, tiles of a shard)
        self.seen_by = np.ascontiguousarray(live.T)
        self.seen, self.seers = (
            np.stack([x[own].sum(0, dtype=np.float32) for own in places]) for x in (self.seen_by, live)
        )
        self.work = by_shard(live, places, places).astype(np.float64)

    def shorten(self) -> np.ndarray:
        """The places of the shortest path that swaps find, at most as long as the path is now.

        A round lets pairs of shards swap the two tiles that get cheapest by it, the best pairs first, each shard once,
        where that shortens the softened path; if none does, t falls.
        """
        best, shortest = self.places.copy(), _path(self.work)
        softness, mean = FIRST_SOFTNESS, self.work.mean() or 1.0
        for _ in range(ROUNDS):
            if softness < LAST_SOFTNESS:
                break
            if not self._swap_pairs(softness * mean):
                softness *= DECAY
            elif _path(self.work) < shortest:
                best, shortest = self.places.copy(), _path(self.work)
        return best

    def _swap_pairs(self, softness: float) -> bool:
        """One round; whether it swapped anything."""
        shards = np.arange(len(self.places))
        path, gradient = _softened(self.work, softness)
        cost = (gradient @ self.seen + gradient.T @ self.seers)[:, self.places]
        change = cost - cost[shards, shards]  # (shard, owner, tile of the owner)
        cheapest, change = change.argmin(-1), change.min(-1)
        pairs = np.stack(np.tril_indices(len(shards), -1), axis=1)
        order = np.argsort((change + change.T)[*pairs.T], kind="stable")
        free = set(shards.tolist())
        for a, b in pairs[order[: PAIRS * len(shards)]].tolist():
            if not {a, b} <= free:
                continue
            places = (a, cheapest[b, a]), (b, cheapest[a, b])
            work = self._work_after(*places)
            if (shorter := _softened(work, softness)[0]) < path:
                self._swap(*places)
                self.work, path, free = work, shorter, free - {a, b}
        return len(free) < len(shards)

    def _work_after(self, one: tuple[int, int], other: tuple[int, int]) -> np.ndarray:
        """W after the tiles at two places have been swapped."""
        a, b, swapped = one[0], other[0], [self.places[one], self.places[other]]
        work = self.work.copy()
        for lines, sums in ((work, self.seen), (work.T, self.seers)):
            moved = sums[:, swapped[1]] - sums[:, swapped[0]]
            lines[a] += moved
            lines[b] -= moved
        both = self.live[np.ix_(swapped, swapped)].astype(np.float64)
        corner = both[0, 0] + both[1, 1] - both[0, 1] - both[1, 0]
        work[[a, b, a, b], [a, b, b, a]] += np.array([corner, corner, -corner, -corner])
        return work

    def _swap(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        x, y = self.places[one], self.places[other]
        for sums, lines in ((self.seen, self.seen_by), (self.seers, self.live)):
            moved = lines[y].astype(np.float32) - lines[x]
            sums[one[0]] += moved
            sums[other[0]] -= moved
        self.places[one], self.places[other] = y, x


def _path(work: np.ndarray) -> float:
    """The critical path of work[query shard, key shard]."""
    return float(work[at_step(len(work))].max(axis=1).sum())


def _greatest_total(work: np.ndarray) -> float:
    """The work of the shard of queries that has most, from work[query shard, key shard]."""
    return float(work.sum(axis=1).max())


def _softened(work: np.ndarray, softness: float) -> tuple[float, np.ndarray]:
    """(the softened critical path, its gradient)."""
    steps = work[at_step(len(work))]
    greatest = steps.max(axis=1, keepdims=True)
    powers = np.exp((steps - greatest) / softness)
    total = powers.sum(axis=1, keepdims=True)
    gradient = np.empty(work.shape, np.float32)
    gradient[at_step(len(work))] = powers / total
    return float(greatest.sum() + softness * np.log(total).sum()), gradient
