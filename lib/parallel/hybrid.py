"""What the recurrences of a hybrid model cost in the order of the tokens that its attention is given.

For one row of the batch, with T tokens on N devices, c = T / N, H heads of K x V state, e bytes to a value, and
summaries of s = 4 H (K V + K + M) bytes, with M = K numbers of a head, or K^2 under the delta rule, that say what
becomes of an earlier state:

                                   a device sends forward                       order
    StateScan, gather              (N - 1) s                                    contiguous; zigzag: twice that
    StateScan, steps               (ceil(log2 N) + 1) s                         the same, and a state in zigzag
    ReorderedScan                  2 c H (K + V) e (N - 1) / N, and StateScan's striped
    ValueColumns                   2 c H (K (N - 1) + V (N - 1) / N) e          any

Backward the same goes the other way. Operations, a token and head, with chunks of C: 2 (C (K + V) + 2 K V), and 2 K V
for the summary of a run; ValueColumns makes the C K of all tokens on every device. Backward costs three times as much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jax.sharding import Mesh

from striate.lib.layouts import Contiguous, Layout, Striped, ZigZag
from striate.lib.parallel.costs import FLOAT32, Hardware, Problem
from striate.lib.parallel.state_scan import EXCHANGES, RecurrenceParallel, ReorderedScan, StateScan, ValueColumns

CHUNK = 64  # tokens


@dataclass(frozen=True)
class Recurrent:
    """The linear recurrences beside attention, as the choice of an order needs to know them.

    Attributes:
      layers: how many of them there are for each layer of attention.
      heads: of one layer, in the whole model.
      key_width, value_width: of a head.
      rule: "sum" or "delta".
    """

    layers: float
    heads: int
    key_width: int
    value_width: int
    rule: str = "sum"

    @property
    def state(self) -> float:
        """Bytes of a head."""
        return FLOAT32 * self.key_width * (self.value_width + 1)

    @property
    def summary(self) -> float:
        """Bytes of a head: the state that a run of tokens leaves, and what it makes of one that was there."""
        return self.state + FLOAT32 * self.key_width ** (2 if self.rule == "delta" else 1)


@dataclass(frozen=True)
class Crossing:
    """How recurrences cross devices, and what those that there are for a layer of attention cost.

    Attributes:
      kind: StateScan, ReorderedScan or ValueColumns.
      exchange: of the states, "gather" or "steps"; None where no states are exchanged.
      sent: bytes that a device sends forward, and backward.
      seconds: of both passes, what is computed included.
    """

    kind: type[RecurrenceParallel]
    exchange: str | None
    sent: tuple[float, float]
    seconds: float

    def on(
        self, mesh: Mesh, layout: Layout, axis="sequence", batch=("data", "fsdp"), heads="tensor"
    ) -> RecurrenceParallel:
        """The Parallel on a mesh whose sequence axis has as many devices as this was predicted for."""
        exchange = {"exchange": self.exchange} if self.exchange else {}
        return self.kind(mesh, axis=axis, batch=batch, heads=heads, layout=layout, **exchange)

    def __str__(self) -> str:
        return self.kind.__name__ + (f", {self.exchange}" if self.exchange else "")


def crossings(recurrent: Recurrent, problem: Problem, layout: Layout, hardware: Hardware) -> Iterator[Crossing]:
    """Every way over one mesh axis that the layout allows. `problem` is that of attention; its widths are not read."""
    shards, heads = problem.shards, recurrent.heads
    per_value = problem.rows * problem.length / shards * heads * problem.itemsize
    keys, values = per_value * recurrent.key_width, per_value * recurrent.value_width
    passes = 2 if problem.backward else 1

    def crossing(kind, exchange, sent, moving, states, own, shared) -> Crossing:
        """`shared` operations a token and head are done for all tokens by every device, `own` for those that it has."""
        tokens = problem.rows * problem.length * heads
        work = 2 * tokens * (own / shards + shared) / (hardware.flops * hardware.efficiency)
        seconds = passes * (moving + states) + (4 if problem.backward else 1) * work
        there = recurrent.layers * sent
        return Crossing(kind, exchange, (there, there * problem.backward), recurrent.layers * seconds)

    pairs = CHUNK * recurrent.key_width
    products = CHUNK * recurrent.value_width + 2 * recurrent.key_width * recurrent.value_width
    runs = pairs + products + recurrent.key_width * recurrent.value_width
    if isinstance(layout, Contiguous | ZigZag):
        for exchange in EXCHANGES:
            sent, states = _states(exchange, recurrent, problem, 2 if isinstance(layout, ZigZag) else 1, hardware)
            yield crossing(StateScan, exchange, sent, 0.0, states, runs, 0)
    elif isinstance(layout, Striped) and problem.length % (layout.unit * shards) == 0:
        moving = hardware.exchange(2 * keys + values, shards) + hardware.exchange(values, shards)
        for exchange in EXCHANGES:
            sent, states = _states(exchange, recurrent, problem, 1, hardware)
            sent += 2 * (keys + values) * (shards - 1) / shards
            yield crossing(ReorderedScan, exchange, sent, moving, states, runs, 0)
    if recurrent.value_width % shards == 0:
        moving = hardware.gather(2 * keys, shards) + 2 * hardware.exchange(values, shards)
        sent = 2 * keys * (shards - 1) + 2 * values * (shards - 1) / shards
        yield crossing(ValueColumns, None, sent, moving, 0.0, products, pairs)


def _states(
    exchange: str, recurrent: Recurrent, problem: Problem, runs: int, hardware: Hardware
) -> tuple[float, float]:
    """(bytes that a device sends forward, seconds of that)."""
    shards, heads = problem.shards, problem.rows * recurrent.heads
    size, state = heads * recurrent.summary, heads * recurrent.state
    if exchange == "gather":
        return runs * (shards - 1) * size, runs * hardware.gather(size, shards)
    distances = [2**step for step in range(math.ceil(math.log2(shards)))] + [1] * (shards > 1)
    hops = sum(hardware.hop(size, distance, shards) for distance in distances)
    # In zigzag the state after all first runs goes from the last device to all others.
    return len(distances) * runs * size + (runs - 1) * state, hops * runs + (runs - 1) * hardware.hop(state, 1, shards)
