"""The choice of a layout and of a way to cross devices, by what a mask and its Tokens make each of them cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jax.sharding import Mesh

from striate.lib.errors import UserError
from striate.lib.layouts import Contiguous, Dealt, Layout, Striped, TileMap, ZigZag
from striate.lib.layouts.balance import deal
from striate.lib.layouts.work import by_shard, on_host
from striate.lib.masks import Mask
from striate.lib.parallel.across import Across
from striate.lib.parallel.costs import GENERIC, HARDWARE, Costs, Hardware, Problem, Strategy, predict
from striate.lib.parallel.gather import AllGather
from striate.lib.parallel.hybrid import Crossing, Recurrent, crossings
from striate.lib.parallel.ring import Ring
from striate.lib.parallel.sharding import SequenceParallel
from striate.lib.parallel.ulysses import RingUlysses, Ulysses
from striate.lib.tokens import Tokens

__all__ = ["GENERIC", "HARDWARE", "Candidate", "Choice", "Hardware", "Strategy", "choose", "kernel_tile"]

SMALLEST, LARGEST = 128, 512  # tokens of a kernel's tile
TILES = 128  # of a shard, where that leaves its tiles large enough
WORTH = 1.02  # times faster that a dealt order has to be, as it is even only for the Tokens that it was made for


@dataclass(frozen=True)
class Candidate:
    """A layout and a strategy, and what they are predicted to cost.

    Attributes:
      order: name of the layout; `layout` is None where the length does not fit it.
      ideal: what the critical path of `costs` would be, if the live tiles of this layout were spread evenly.
      costs: None where the layout does not fit, or the heads do not divide.
      obstacle: why this cannot run, in a few words; empty where it can.
      recurrences: how those of a hybrid model cross devices in this order, the fastest way; None where there are none.
    """

    order: str
    layout: Layout | None
    strategy: Strategy
    ideal: float = math.nan
    costs: Costs | None = None
    obstacle: str = ""
    recurrences: Crossing | None = None

    @property
    def seconds(self) -> float:
        """Predicted, of a layer of attention and its recurrences; infinite where it cannot run."""
        if self.obstacle or not self.costs:
            return math.inf
        return self.costs.seconds + (self.recurrences.seconds if self.recurrences else 0.0)

    @property
    def balance(self) -> float:
        """ideal / critical path, 1 at best."""
        return self.ideal / self.costs.path if self.costs.path else 1.0

    def __str__(self) -> str:
        beside = f" and {self.recurrences}" if self.recurrences else ""
        return f"{self.strategy}{beside} in {self.order} order"


@dataclass(frozen=True)
class Choice:
    """What was chosen, why, and all that it was compared with.

    Attributes:
      candidates: simple layouts first, and for each of them simple strategies first.
      parallel: to be passed to attention, or, with recurrences, to a model; a Strategy, to be made `on` a mesh, where
        only a number of shards was given.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    parallel: SequenceParallel | Across | Strategy
    hardware: Hardware
    tile: int

    @property
    def layout(self) -> Layout:
        return self.chosen.layout

    @property
    def offsets(self) -> tuple[int, ...]:
        """Of the ring, those at which some device has work."""
        return self.chosen.costs.offsets

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """Sentences with numbers."""
        return tuple(_reasons(self))

    def table(self):
        """A rich table of all candidates, fastest first, at most 100 columns wide."""
        return _table(self)


def choose(
    mask: Mask,
    tokens: Tokens,
    mesh: Mesh | int,
    *,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int = 128,
    itemsize: int = 2,
    backward: bool = True,
    tile: int | None = None,
    hardware: Hardware = GENERIC,
    recurrent: Recurrent | None = None,
    axis: str = "sequence",
    ring_axis: str = "ring",
    batch: tuple[str, ...] = ("data", "fsdp"),
    heads_axis: str = "tensor",
) -> Choice:
    """The layout and the strategy with which attention is predicted to take least time.

    Args:
      mask: the formula.
      tokens: concrete Tokens of the self-attention, natural order: those of one batch, or typical ones.
      mesh: the devices, or how many of them share a sequence. A mesh with `ring_axis` as well as `axis` cuts the
        sequence over both, which RingUlysses alone does.
      heads, kv_heads, head_dim: of the whole model; there are as many key/value heads as heads by default.
      itemsize: bytes of a value of q, k and v.
      backward: whether there is a backward pass.
      tile: of the kernel, in both directions; by default `kernel_tile` of a shard.
      hardware: see HARDWARE.
      recurrent: the linear recurrences of a hybrid model, which cross one mesh axis in the same order of the tokens.
      axis, ring_axis, batch, heads_axis: names of mesh axes, as the strategies have them.

    Raises:
      UserError: a length that no layout cuts into so many shards, heads that do not divide, Tokens that are traced or
        lack a field of the mask, a mesh without the axis, or keys and values that fit no device.
    """
    sizes = {axis: mesh} if isinstance(mesh, int) else dict(mesh.shape)
    tokens, kv_heads = on_host(tokens), kv_heads or heads
    _check(sizes, axis, heads_axis, heads, kv_heads)
    shards, tensor, (rows, length) = sizes[axis] * sizes.get(ring_axis, 1), sizes.get(heads_axis, 1), tokens.shape
    whole = Problem(
        rows=rows / math.prod(sizes.get(name, 1) for name in batch),
        length=length,
        shards=shards,
        heads=heads // tensor,
        kv_heads=kv_heads // tensor,
        head_dim=head_dim,
        itemsize=itemsize,
        backward=backward,
        tile=tile or kernel_tile(length // shards),
    )
    problems, any_mesh = _by_formula(mask, whole, tensor), isinstance(mesh, int)
    strategies = _strategies(problems, any_mesh) if ring_axis not in sizes else [Strategy(RingUlysses, sizes[axis])]
    recurrent = recurrent and replace(recurrent, heads=recurrent.heads // tensor)
    candidates = tuple(_Comparison(problems, tokens, hardware, recurrent).candidates(strategies))
    chosen = _fastest(candidates, whole)
    parallel = chosen.strategy if any_mesh else _on(mesh, chosen, axis, ring_axis, batch, heads_axis)
    return Choice(chosen, candidates, parallel, hardware, whole.tile)


def kernel_tile(length: int) -> int:
    """The tile of a kernel for shards of `length` tokens: from 128 to 512, unless the shard is shorter."""
    power = 2 ** int(math.log2(max(length / TILES, 1)))
    return min(max(power, SMALLEST), LARGEST, length)


def _check(sizes: Mapping[str, int], axis: str, heads_axis: str, heads: int, kv_heads: int) -> None:
    if axis not in sizes:
        raise UserError(
            f"The sequence is spread over the mesh axis {axis!r}, and the mesh has {dict(sizes)}: name one."
        )
    if min(sizes[axis], heads, kv_heads) < 1 or heads % kv_heads:
        raise UserError(
            f"{heads} heads with {kv_heads} key/value heads over {sizes[axis]} shards cannot be: all are at least 1, "
            "and heads are a multiple of key/value heads."
        )
    if kv_heads % sizes.get(heads_axis, 1):
        raise UserError(
            f"{kv_heads} key/value heads do not divide over the {sizes[heads_axis]} devices of mesh axis "
            f"{heads_axis!r}: make them a multiple of that, or change the mesh."
        )


def _by_formula(mask: Mask, whole: Problem, tensor: int) -> dict[Mask, Problem]:
    """The problem of every formula: attention computes heads that share one together, and formulas one by one.

    Key/value heads are repeated for a formula that not all heads of their group share.
    """
    group, problems = whole.heads // whole.kv_heads, {}
    for formula, own in mask.by_formula(whole.heads * tensor).items():
        groups = Counter(head // group for head in own)
        kv_heads = len(groups) if set(groups.values()) == {group} else len(own)
        if len(own) % tensor or kv_heads % tensor:
            raise UserError(
                f"{len(own)} heads, with {kv_heads} key/value heads, have the mask {formula}, and they do not divide "
                f"over a mesh axis of {tensor} devices: make them multiples of that, or change the mesh."
            )
        problems[formula] = replace(whole, heads=len(own) // tensor, kv_heads=kv_heads // tensor)
    return problems


def _strategies(problems: Mapping[Mask, Problem], any_mesh: bool) -> list[Strategy]:
    """Those of one mesh axis; where any mesh can be made, those of two, with heads dealt as widely as they divide."""
    shards = next(iter(problems.values())).shards
    divided = (math.gcd(*(getattr(x, heads) for x in problems.values())) for heads in ("kv_heads", "heads"))
    inside = [n for n in range(2, shards) if shards % n == 0 and any_mesh]
    widest = {max((n for n in inside if heads % n == 0), default=0) for heads in divided}
    one_axis = [Strategy(Ring), Strategy(AllGather), Strategy(Ulysses, shards)]
    return one_axis + [Strategy(RingUlysses, n) for n in sorted(widest - {0})]


@dataclass(frozen=True)
class _Comparison:
    """The candidates for some problems, one of every formula, which differ in nothing but their heads."""

    problems: dict[Mask, Problem]
    tokens: Tokens
    hardware: Hardware
    recurrent: Recurrent | None

    @property
    def _any(self) -> Problem:
        return next(iter(self.problems.values()))

    @cached_property
    def _natural(self) -> dict[Mask, TileMap]:
        """The tiles of every formula in natural order; none where shards cut through tiles."""
        tile, whole = self._any.tile, self._any.length % (self._any.shards * self._any.tile) == 0
        return {formula: TileMap.of(formula, self.tokens, (tile, tile)) for formula in self.problems if whole}

    def candidates(self, strategies: list[Strategy]) -> Iterator[Candidate]:
        """Every strategy in every simple layout, then each in the one that is made for it, of tiles dealt evenly."""
        shards, tile, length = self._any.shards, self._any.tile, self._any.length
        if length % shards:
            down = length - length % shards
            raise UserError(
                f"No layout cuts {length} tokens into {shards} equal shards: use {f'{down} or ' if down else ''}"
                f"{down + shards} tokens, or another number of devices."
            )
        simple = {"contiguous": Contiguous(shards), "zigzag": ZigZag(shards), f"striped {tile}": Striped(shards, tile)}
        for name, layout in (simple | {"striped 1": Striped(shards, 1)}).items():
            if length % layout.unit == 0:
                yield from self._in_order(name, layout, strategies)
            else:
                obstacle = f"length % {layout.unit} > 0"
                yield from (Candidate(name, None, strategy, obstacle=obstacle) for strategy in strategies)
        for strategy in strategies:
            ring = shards // strategy.dealt
            if ring > 1 and self._natural:
                dealt = deal(self._all_heads(), ring, tile, lockstep=strategy.kind is not AllGather)
                yield from self._in_order("dealt", Dealt(shards, dealt.starts), [strategy])
            elif ring > 1:
                yield Candidate("dealt", None, strategy, obstacle=f"length % {shards * tile} > 0")

    def _in_order(self, name: str, layout: Layout, strategies: list[Strategy]) -> Iterator[Candidate]:
        live, heads = self._live(layout), sum(problem.heads for problem in self.problems.values())
        parts = {formula: problem.heads / heads for formula, problem in self.problems.items()}
        ideal = sum(part * float(live[formula].sum()) / layout.shards for formula, part in parts.items())
        for strategy in strategies:
            undivided = [problem.heads for problem in self.problems.values() if problem.heads % strategy.dealt]
            if undivided:
                yield Candidate(name, layout, strategy, obstacle=f"{undivided[0]} heads over {strategy.dealt}")
                continue
            costs = {f: predict(problem, live[f], strategy, self.hardware) for f, problem in self.problems.items()}
            total = Costs.one_by_one([(costs[formula], part) for formula, part in parts.items()])
            fits = total.held <= self.hardware.memory
            obstacle = "" if fits else f"holds over {_bytes(self.hardware.memory)}"
            across = self._across(layout, strategy)
            if self.recurrent and not across:
                obstacle = obstacle or "no way for recurrences"
            yield Candidate(name, layout, strategy, ideal, total, obstacle, across)

    def _across(self, layout: Layout, strategy: Strategy) -> Crossing | None:
        """The fastest way for recurrences over the one mesh axis that they can cross."""
        if not self.recurrent or strategy.kind is RingUlysses:
            return None
        ways = crossings(self.recurrent, self._any, layout, self.hardware)
        return min(ways, key=lambda way: way.seconds, default=None)

    def _live(self, layout: Layout) -> dict[Mask, np.ndarray]:
        """Live tiles (query shard, key shard) a row, of every formula: natural tiles, where the layout keeps them."""
        maps, places = self._natural, layout.places(self._any.length, self._any.tile)
        if places is None:
            tile, tokens = (self._any.tile, self._any.tile), layout.permute(self.tokens)
            maps = {formula: TileMap.of(formula, tokens, tile, layout.shards) for formula in self.problems}
            places = np.arange(len(next(iter(maps.values())).live))
        places, rows = places.reshape(layout.shards, -1), self.tokens.shape[0]
        return {formula: by_shard(tiles.live, places, places) / rows for formula, tiles in maps.items()}

    def _all_heads(self) -> np.ndarray:
        """Live tiles (query tiles, key tiles), of all heads added up where their formulas differ."""
        maps = [(self.problems[formula].heads, tiles) for formula, tiles in self._natural.items()]
        if len(maps) == 1:
            return maps[0][1].live
        dtype = np.min_scalar_type(sum(heads * tiles.rows for heads, tiles in maps))
        return sum(heads * tiles.live.astype(dtype) for heads, tiles in maps)


def _on(mesh: Mesh, chosen: Candidate, axis, ring_axis, batch, heads_axis) -> SequenceParallel | Across:
    parallel = chosen.strategy.on(mesh, axis, ring_axis, batch, heads_axis)
    if not chosen.recurrences:
        return parallel
    return Across(parallel, chosen.recurrences.on(mesh, chosen.layout, axis, batch, heads_axis))


def _fastest(candidates: tuple[Candidate, ...], problem: Problem) -> Candidate:
    least = min(candidate.seconds for candidate in candidates)
    if math.isinf(least):
        obstacles = dict.fromkeys(f"{c.strategy}: {c.obstacle}" for c in candidates if c.layout)
        raise UserError(
            f"Nothing runs attention over {problem.length} tokens on {problem.shards} devices "
            f"({'; '.join(obstacles)}): use more devices, other hardware, or other heads."
        )
    plain = [candidate for candidate in candidates if not isinstance(candidate.layout, Dealt)]
    fastest = min(plain, key=lambda candidate: candidate.seconds)
    return fastest if fastest.seconds <= WORTH * least else min(candidates, key=lambda candidate: candidate.seconds)


def _reasons(choice: Choice) -> Iterator[str]:
    chosen, costs = choice.chosen, choice.chosen.costs
    yield (
        f"{chosen}: {costs.path:.0f} tiles of {choice.tile} x {choice.tile} on the critical path, "
        f"{chosen.ideal:.0f} if the work were even (balance {chosen.balance:.3f})."
    )
    if chosen.strategy.kind in (Ring, RingUlysses):
        ring = chosen.layout.shards // chosen.strategy.dealt
        yield f"Some device has work at {len(costs.offsets)} of {ring} offsets; keys and values hop {costs.hops} times."
    yield (
        f"A device sends {_bytes(costs.sent[0])} forward and {_bytes(costs.sent[1])} backward, and holds "
        f"{_bytes(costs.held)} of keys, values and gradients."
    )
    if across := chosen.recurrences:
        yield (
            f"Recurrences cross by {across}: a device sends {_bytes(across.sent[0])} forward and "
            f"{_bytes(across.sent[1])} backward, in {_seconds(across.seconds)} with what is computed."
        )
    yield f"Predicted {_seconds(chosen.seconds)} on {choice.hardware.name}."
    running = [candidate for candidate in choice.candidates if math.isfinite(candidate.seconds)]
    for title, same in (("strategy", "strategy"), ("layout", "order")):
        others = [candidate for candidate in running if getattr(candidate, same) != getattr(chosen, same)]
        if others:
            best = min(others, key=lambda candidate: candidate.seconds)
            ratio = best.seconds / chosen.seconds
            yield f"The best with another {title}, {best}, takes {_seconds(best.seconds)}, {ratio:.2f} x as long."
    for strategy in dict.fromkeys(candidate.strategy for candidate in choice.candidates):
        obstacles = {c.obstacle for c in choice.candidates if c.strategy == strategy and c.layout}
        if "" not in obstacles:
            yield f"{strategy} cannot run: {', '.join(sorted(obstacles))}."


def _table(choice: Choice):
    from rich.table import Table

    title = f"tiles of {choice.tile} x {choice.tile}, {choice.hardware.name}"
    table = Table("", "layout", "strategy", title=title, box=None, padding=(0, 2, 0, 0))
    if hybrid := choice.chosen.recurrences is not None:
        table.add_column("recurrences")
    for name in ("path", "balance", "hops", "sent", "held", "time"):
        table.add_column(name, justify="right")
    table.add_column("")
    for c in sorted(choice.candidates, key=lambda candidate: candidate.seconds):
        cells = [""] * 6
        if c.costs:
            sizes = _bytes(sum(c.costs.sent)), _bytes(c.costs.held)
            cells = [f"{c.costs.path:.0f}", f"{c.balance:.3f}", str(c.costs.hops), *sizes, _seconds(c.seconds)]
        beside = [str(c.recurrences or "")] if hybrid else []
        table.add_row("*" if c is choice.chosen else "", c.order, str(c.strategy), *beside, *cells, c.obstacle)
    return table


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _seconds(seconds: float) -> str:
    if math.isinf(seconds):
        return ""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
