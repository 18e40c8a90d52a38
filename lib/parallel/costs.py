"""What a way to cross devices costs, counted on the host from the live tiles of every pair of shards.

For one row of the batch, with T tokens on N devices, c = T / N, H heads and K key/value heads of width D, e bytes to a
value, U devices that heads are dealt to and R = N / U devices around a ring:

                 critical path, in tiles of all heads   sent forward                      keys and values held
    Ring         sum over steps of the greatest         a hop 2 c K D e                   2 slots of 2 c K D e
    AllGather    greatest of the sums over steps        (N - 1) 2 c K D e                 2 T K D e
    Ulysses      all live tiles / N                     (2 H + 2 L) c D e (U - 1) / U     2 c L D e
    RingUlysses  that of a Ring of R shards, / U        both of the above, L for K        2 slots of 2 c L D e

with L = lcm(K, U), as key/value heads are repeated until they can be dealt. A ring that is gone around several times,
with a share of the heads each, holds a share of these bytes (`rounds_that_pay`). Backward, keys and values move again,
and their gradients in float32. A ring visits only the offsets at which some device has work, and a hop hides behind the
work of its step; a gather or an exchange hides behind nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from striate.lib.layouts.work import at_step
from striate.lib.parallel.gather import AllGather
from striate.lib.parallel.ring import rounds_that_pay
from striate.lib.parallel.sharding import SequenceParallel
from striate.lib.parallel.ulysses import RingUlysses

FORWARD, BACKWARD = 4, 10  # operations of a pair, a head and a unit of width: two products, and five
FLOAT32 = 4


@dataclass(frozen=True)
class Hardware:
    """A device and its links, as published. The times that follow compare choices; they promise nothing.

    Attributes:
      flops: bfloat16 operations a second of matrix products, dense, at the peak.
      link: bytes a second to the next device, one way.
      memory: bytes of a device.
      switched: every device reaches every other one at `link`; else the devices of an axis are linked in a ring.
      efficiency: the part of `flops` that attention reaches.
      latency: seconds that a collective takes however little it moves.
    """

    name: str
    flops: float
    link: float
    memory: float
    switched: bool = False
    efficiency: float = 0.5
    latency: float = 1e-5

    def hop(self, size: float, distance: int, devices: int) -> float:
        """Seconds until every device has `size` bytes of the device `distance` before it."""
        links = 1 if self.switched else min(distance, devices - distance)
        return self.latency + size * links / self.link if size and distance else 0.0

    def gather(self, size: float, devices: int) -> float:
        """Seconds until every device has `size` bytes of each other one; a ring carries them both ways round."""
        ways = 1 if self.switched else 2
        return self.latency + size * (devices - 1) / ways / self.link if devices > 1 else 0.0

    def exchange(self, size: float, devices: int) -> float:
        """Seconds of an all-to-all of `size` bytes a device; in a ring they cross devices / 4 links, both ways."""
        links = (devices - 1) / devices if self.switched else devices / 8
        return self.latency + size * links / self.link if devices > 1 else 0.0


# TPU: cloud.google.com/tpu/docs/v5p, /v5e, /v6e; a link is the bidirectional bandwidth of a chip over the 2 ways of its
# 6, 4 and 4 links. GPU: data sheets of H100 SXM and H200 SXM; dense rates, and one way of the 900 GB/s of NVLink.
HARDWARE = {
    "v5p": Hardware("TPU v5p", 459e12, 100e9, 95 * 2**30),
    "v5e": Hardware("TPU v5e", 197e12, 50e9, 16 * 2**30),
    "v6e": Hardware("TPU v6e", 918e12, 100e9, 32 * 2**30),
    "h100": Hardware("H100", 989e12, 450e9, 80e9, switched=True),
    "h200": Hardware("H200", 989e12, 450e9, 141e9, switched=True),
}
GENERIC = Hardware("a generic device", 200e12, 50e9, 32e9)


@dataclass(frozen=True)
class Strategy:
    """A way to cross devices, of which there may be no mesh yet: its class, and how many devices heads are dealt to."""

    kind: type[SequenceParallel]
    dealt: int = 1

    def on(self, mesh: Mesh, axis="sequence", ring_axis="ring", batch=("data", "fsdp"), heads="tensor"):
        """The Parallel on a mesh whose sequence axes have as many devices as this was predicted for."""
        ring = {"ring_axis": ring_axis} if self.kind is RingUlysses else {}
        return self.kind(mesh, axis=axis, batch=batch, heads=heads, **ring)

    def __str__(self) -> str:
        return self.kind.__name__ + (f" {self.dealt}" if self.kind is RingUlysses else "")


@dataclass(frozen=True)
class Problem:
    """Attention of heads that share a formula, as a device sees it that shares a sequence with others.

    Attributes:
      rows: of the batch, on this device.
      heads, kv_heads: what the devices of a sequence share, after a mesh axis of the heads has had its part.
      itemsize: bytes of a value of q, k and v.
      backward: whether there is a backward pass.
      tile: tokens of a tile, in both directions.
    """

    rows: float
    length: int
    shards: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int
    backward: bool
    tile: int

    def values(self, heads: int) -> float:
        """Numbers in these heads of the tokens of a shard."""
        return self.rows * self.length / self.shards * heads * self.head_dim

    def seconds(self, operations: int, hardware: Hardware) -> float:
        """Of one tile of all heads and rows, with so many operations a pair, head and unit of width."""
        tile = operations * self.tile**2 * self.heads * self.head_dim * self.rows
        return tile / (hardware.flops * hardware.efficiency)


class Costs(NamedTuple):
    """Predicted for one layout and one strategy.

    Attributes:
      path: tiles on the critical path of a pass, each of all heads and rows.
      offsets: of the ring, those at which some device has work; (0,) where nothing goes around one.
      hops: how often a device sends keys and values on around a ring, in a pass.
      sent: bytes that a device sends forward, and backward.
      held: bytes of keys, values and their gradients on a device, while they move.
      seconds: of the forward pass, and of the backward one where there is one.
    """

    path: float
    offsets: tuple[int, ...]
    hops: int
    sent: tuple[float, float]
    held: float
    seconds: float

    @classmethod
    def one_by_one(cls, parts: Sequence[tuple[Costs, float]]) -> Costs:
        """Of several formulas after each other, each with its part of all heads."""
        costs = [cost for cost, _ in parts]
        forward, backward = (sum(cost.sent[way] for cost in costs) for way in (0, 1))
        return cls(
            path=sum(cost.path * part for cost, part in parts),
            offsets=tuple(sorted(set().union(*(cost.offsets for cost in costs)))),
            hops=sum(cost.hops for cost in costs),
            sent=(forward, backward),
            held=max(cost.held for cost in costs),
            seconds=sum(cost.seconds for cost in costs),
        )


def predict(problem: Problem, live: np.ndarray, strategy: Strategy, hardware: Hardware) -> Costs:
    """The costs of a strategy, from live tiles (query shard, key shard) a row; its heads have to divide."""
    return (_gathered if strategy.kind is AllGather else _around)(problem, live, strategy.dealt, hardware)


def _gathered(problem: Problem, live: np.ndarray, _: int, hardware: Hardware) -> Costs:
    others, path = problem.shards - 1, float(live.sum(axis=1).max())
    block, gradients = (problem.values(2 * problem.kv_heads) * size for size in (problem.itemsize, FLOAT32))
    moved = hardware.gather(block, problem.shards)
    seconds = moved + path * problem.seconds(FORWARD, hardware)
    if problem.backward:
        moved += hardware.gather(gradients, problem.shards)
        seconds += moved + path * problem.seconds(BACKWARD, hardware)
    return Costs(
        path=path,
        offsets=(0,),
        hops=0,
        sent=(others * block, others * (block + gradients) * problem.backward),
        held=problem.shards * (block + gradients * problem.backward),
        seconds=seconds,
    )


def _around(problem: Problem, live: np.ndarray, dealt: int, hardware: Hardware) -> Costs:
    """Ring, Ulysses (a ring of one device) and RingUlysses."""
    ring, kv_heads = problem.shards // dealt, math.lcm(problem.kv_heads, dealt)
    steps = (live.reshape(ring, dealt, ring, dealt).sum((1, 3)) / dealt)[at_step(ring)].max(axis=1)
    way = Way(tuple(np.flatnonzero(steps).tolist()) or (0,), ring)
    block, gradients = (problem.values(2 * kv_heads) * size for size in (problem.itemsize, FLOAT32))
    forward = problem.values(2 * problem.heads + 2 * kv_heads) * problem.itemsize
    backward = forward + problem.values(problem.heads + 2 * kv_heads) * FLOAT32
    rounds = rounds_that_pay(problem.heads // dealt, kv_heads // dealt, *(problem.length // ring,) * 2)
    seconds = hardware.exchange(forward, dealt)
    seconds += way.seconds(steps * problem.seconds(FORWARD, hardware), block, 0, hardware)
    if problem.backward:
        seconds += hardware.exchange(backward, dealt)
        seconds += way.seconds(steps * problem.seconds(BACKWARD, hardware), block, gradients, hardware)
    share, around = (dealt - 1) / dealt, way.key_hops * block
    sent_back = share * backward + around + way.gradient_hops * gradients
    return Costs(
        path=float(steps.sum()),
        offsets=way.offsets,
        hops=way.key_hops,
        sent=(share * forward + around, sent_back * problem.backward),
        held=(2 if way.key_hops else 1) * (block + gradients * problem.backward) / (rounds if ring > 1 else 1),
        seconds=seconds,
    )


class Way(NamedTuple):
    """Of a block of keys around a ring: to the first offset, from each to the next, and its gradients' way home."""

    offsets: tuple[int, ...]
    devices: int

    @property
    def distances(self) -> list[int]:
        """To the first offset, and from each to the next."""
        return [there - here for here, there in itertools.pairwise((0, *self.offsets))]

    @property
    def key_hops(self) -> int:
        """How often keys and values are sent on."""
        return len(self.offsets) - (0 in self.offsets)

    @property
    def gradient_hops(self) -> int:
        """How often their gradients are, from where the first work is to the owner of the keys."""
        return len(self.offsets) - 1 + (self.offsets[-1] > 0)

    def seconds(self, work: np.ndarray, block: float, gradients: float, hardware: Hardware) -> float:
        """Of a pass with work[step] seconds of compute, which hides how keys move on and gradients follow."""
        first, *others = self.distances
        total = hardware.hop(block, first, self.devices)
        for offset, last, following in zip(self.offsets, (0, *others), (*others, 0), strict=True):
            moved = hardware.hop(block, following, self.devices) + hardware.hop(gradients, last, self.devices)
            total += max(float(work[offset]), moved)
        return total + hardware.hop(gradients, -self.offsets[-1] % self.devices, self.devices)
