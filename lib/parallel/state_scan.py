"""StateScan: a linear recurrence over a sharded sequence. Only states cross devices, whatever the length.

The sequence is cut into runs, intervals of it: one for each device, or two where they lie in zigzag. Every device

    1. summarises its runs: what they do to the state before them (lib/recurrence.py);
    2. learns the state before each: the summaries of all earlier runs, composed and applied to the initial state;
    3. goes through its runs from there.

In 2 either all devices gather all summaries and compose them ("gather"), or neighbours at distances 1, 2, 4, ... pass
on what they have composed so far ("steps"), which keeps a few states in memory instead of one for each device. The
backward pass is the transpose: gradients of states go the other way.

Every causal recurrence, decayed or not, needs such runs. In a token-striped order the tokens of all other devices come
between two neighbours, and states of devices mean nothing. `ReorderedScan` converts to runs and back, by an all-to-all.
`ValueColumns` needs no order: columns of the values never mix, so each device takes a share of them and all tokens.

Source: Sun et al. 2025 (LASP-2), section 3, for the gather; Hillis and Steele 1986 for the steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from striate.lib.errors import UserError
from striate.lib.layouts import Contiguous, Layout, Striped, ZigZag
from striate.lib.parallel.sharding import SequenceParallel
from striate.lib.recurrence import Inputs, Recurrence, State, Summary

EXCHANGES = ("gather", "steps")


class RecurrenceParallel(SequenceParallel):
    """What every way for a recurrence to cross devices shares: the specs of its arrays, and the map over shards."""

    def recur(self, recurrence: Recurrence, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        """(out (B, T, K, G, V), the state after the last token), both of global arrays."""
        if self._inside:
            return self.shard_recur(recurrence, inputs, state)
        self.check(inputs)
        array, _, tokens = self._specs()
        batch, length, heads, _ = array
        of_inputs = Inputs(
            P(batch, length, heads, None, None),
            array,
            array,
            None if inputs.log_decay is None else P(*array[: inputs.log_decay.ndim]),
            None if inputs.beta is None else P(batch, length, heads),
            tokens,
        )
        of_state = State(P(batch, heads, None, None), P(batch, heads, None), P(batch))
        specs = (of_inputs, of_state), (of_inputs.q, of_state)
        return self._over_shards(lambda *arrays: self.shard_recur(recurrence, *arrays), *specs)(inputs, state)

    def shard_recur(self, recurrence: Recurrence, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        """On one device: the same of its shards of the inputs; the state is that of the whole sequence."""
        raise NotImplementedError

    def check(self, inputs: Inputs) -> None:
        """Raises UserError where the arrays do not divide."""
        self._check(inputs.q, inputs.k)


@dataclass(frozen=True)
class StateScan(RecurrenceParallel):
    """States go from device to device.

    Attributes:
      layout: the order of the tokens, Contiguous (None) or ZigZag.
      exchange: "gather" or "steps"; None takes steps where the states of all devices would need more memory than the
        keys and values of one.
    """

    layout: Layout | None = None
    exchange: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.exchange not in (None, *EXCHANGES):
            raise UserError(f"exchange {self.exchange!r} is not known; there are {', '.join(map(repr, EXCHANGES))}.")
        if not isinstance(self.layout, Contiguous | ZigZag | None):
            raise UserError(
                f"StateScan hands states from one interval of the sequence to the next, and under {self.layout} the "
                f"tokens of other devices lie between those of one: use ZigZag({self.shards}) for attention and "
                f"recurrence alike, ReorderedScan(mesh, layout={self.layout}), or ValueColumns with that layout."
            )
        _check_shards(self)

    @property
    def runs(self) -> int:
        """Intervals of the sequence on each device."""
        return 2 if isinstance(self.layout, ZigZag) else 1

    def check(self, inputs):
        super().check(inputs)
        (self.layout or Contiguous(self.shards)).check(inputs.k.shape[1])

    def shard_recur(self, recurrence, inputs, state):
        length = inputs.k.shape[1] // self.runs
        parts = [jax.tree.map(lambda x, i=i: x[:, i * length : (i + 1) * length], inputs) for i in range(self.runs)]
        exchange, out = self.exchange or self._cheapest(inputs, state), []
        for run, part in enumerate(parts):
            before, state = self._before(exchange, recurrence.summarise(part), state, ascending=run == 0)
            out.append(recurrence.run(part, before)[0])
        return jnp.concatenate(out, axis=1), state

    def _cheapest(self, inputs: Inputs, state: State) -> str:
        states, held = self.shards * state.memory.nbytes, inputs.k.nbytes + inputs.v.nbytes
        return "gather" if states <= held else "steps"

    def _before(self, exchange: str, summary: Summary, state: State, ascending: bool) -> tuple[State, State]:
        """(the state before the run of this device, that after the runs of all); `state` is before all of them."""
        return (self._gather if exchange == "gather" else self._steps)(summary, state, ascending)

    def _gather(self, summary, state, ascending):
        place = jax.lax.axis_index(self.axis)
        all_ = jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis), summary)
        if not ascending:
            place, all_ = self.shards - 1 - place, jax.tree.map(lambda x: x[::-1], all_)
        after, before = jax.lax.scan(lambda state, summary: (summary.after(state), state), state, all_)
        return jax.tree.map(lambda x: x[place], before), after

    def _steps(self, summary, state, ascending):
        place = jax.lax.axis_index(self.axis)
        place = place if ascending else self.shards - 1 - place

        def from_earlier(tree, distance: int):
            sign = 1 if ascending else -1
            pairs = [(i, i + sign * distance) for i in range(self.shards) if 0 <= i + sign * distance < self.shards]
            return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)

        def choose(condition, tree, otherwise):
            return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, otherwise)

        distance = 1
        while distance < self.shards:
            composed = from_earlier(summary, distance).then(summary)
            summary = choose(place >= distance, composed, summary)
            distance *= 2
        before = choose(place > 0, from_earlier(summary, 1).after(state), state)
        last = choose(place == self.shards - 1, summary.after(state), jax.tree.map(jnp.zeros_like, state))
        return before, jax.tree.map(lambda x: jax.lax.psum(x, self.axis), last)


@dataclass(frozen=True)
class ValueColumns(RecurrenceParallel):
    """Every device takes all tokens and a share of the columns of the values, in any order of the tokens.

    Queries, keys and decays are gathered; values, and what comes out, are exchanged by an all-to-all. It is not limited
    by the number of heads as Ulysses is, but by the width of the values.

    Attributes:
      layout: the order of the tokens; None is Contiguous.
    """

    layout: Layout | None = None

    def __post_init__(self):
        super().__post_init__()
        _check_shards(self)

    def check(self, inputs):
        super().check(inputs)
        if inputs.v.shape[3] % self.shards:
            raise UserError(
                f"ValueColumns deals the columns of the values to the {self.shards} devices of mesh axis "
                f"{self.axis!r}, and {inputs.v.shape[3]} do not divide: use StateScan, or another value width."
            )

    def shard_recur(self, recurrence, inputs, state):
        layout, width = self.layout or Contiguous(self.shards), inputs.v.shape[3] // self.shards
        columns = jax.lax.axis_index(self.axis) * width
        v = jax.lax.all_to_all(inputs.v, self.axis, split_axis=3, concat_axis=1, tiled=True)
        gathered = jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis, axis=1, tiled=True), inputs._replace(v=None))
        own = state._replace(memory=jax.lax.dynamic_slice_in_dim(state.memory, columns, width, 3))
        out, own = recurrence.run(layout.restore(gathered._replace(v=v)), own)
        out = jax.lax.all_to_all(layout.permute(out), self.axis, split_axis=1, concat_axis=4, tiled=True)
        return out, own._replace(memory=jax.lax.all_gather(own.memory, self.axis, axis=3, tiled=True))


@dataclass(frozen=True)
class ReorderedScan(RecurrenceParallel):
    """StateScan for tokens that lie striped: an all-to-all makes runs of them, another one stripes of what comes out.

    Attributes:
      layout: the order of the tokens.
      exchange: as in StateScan.
    """

    layout: Striped | None = None
    exchange: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.layout, Striped):
            raise UserError(f"ReorderedScan is for a Striped layout, and got {self.layout}: use StateScan.")
        _check_shards(self)

    def check(self, inputs):
        super().check(inputs)
        length, unit = inputs.k.shape[1], self.layout.unit * self.shards
        if length % unit:
            raise UserError(
                f"{self.layout} becomes contiguous by one all-to-all where the length is a multiple of stripe x shards "
                f"x shards = {unit}, and it is {length}: use {-(-length // unit) * unit}, a smaller stripe, or "
                "ValueColumns."
            )

    def shard_recur(self, recurrence, inputs, state):
        scan = StateScan(self.mesh, self.axis, self.batch, self.heads, exchange=self.exchange)
        out, state = scan.shard_recur(recurrence, jax.tree.map(self._to_run, inputs), state)
        return self._to_stripes(out), state

    def _to_run(self, x):
        """The stripes of one device to a run: of every device come those that lie in it, `shards` of them apart."""
        x = self._exchange(x)
        return self._dealt(x, self.shards, -1).swapaxes(1, 2).reshape(x.shape)

    def _to_stripes(self, x):
        return self._exchange(self._dealt(x, -1, self.shards).swapaxes(1, 2).reshape(x.shape))

    def _dealt(self, x, *parts: int):
        return x.reshape(x.shape[0], *parts, self.layout.stripe, *x.shape[2:])

    def _exchange(self, x):
        return jax.lax.all_to_all(x, self.axis, split_axis=1, concat_axis=1, tiled=True)


def _check_shards(parallel: RecurrenceParallel) -> None:
    if parallel.layout and parallel.layout.shards != parallel.shards:
        raise UserError(
            f"{parallel.layout} is for {parallel.layout.shards} shards, and mesh axis {parallel.axis!r} has "
            f"{parallel.shards} devices: they have to agree."
        )
