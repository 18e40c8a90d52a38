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

Convolutions, which such models put before a recurrence, cross devices by the same strategies: the last tokens of a run
go to the device that holds the next one. Where taps reach farther than a run, every device takes all tokens and a share
of the channels instead, which never mix.

Source: Sun et al. 2025 (LASP-2), section 3, for the gather; Hillis and Steele 1986 for the steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from striate.lib.convolution import Form, Tail, convolve
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
        self._check(inputs.q, inputs.k)
        self.check(inputs.k.shape[1])
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

    def convolve(self, form: Form, x_BTC: jax.Array, document_BT: jax.Array, taps_WC: jax.Array, tail: Tail | None):
        """(y (B, T, C), the Tail of the sequence) of lib/convolution.py, of global arrays."""
        if self._inside:
            return self.shard_convolve(form, x_BTC, document_BT, taps_WC, tail)
        _, of_x, tokens = self._specs()
        batch, _, channels = of_x
        names = ("batch", "length", "channels")
        self._check_division(*zip(names, x_BTC.shape, of_x, strict=True))
        self.check(x_BTC.shape[1])
        of_tail = Tail(P(batch, None, channels), P(batch))
        specs = (of_x, tokens, P(None, channels), tail and of_tail), (of_x, of_tail)
        return self._over_shards(lambda *arrays: self.shard_convolve(form, *arrays), *specs)(
            x_BTC, document_BT, taps_WC, tail
        )

    def shard_recur(self, recurrence: Recurrence, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        """On one device: the same of its shards of the inputs; the state is that of the whole sequence."""
        raise NotImplementedError

    def shard_convolve(self, form: Form, x, document, taps, tail: Tail | None) -> tuple[jax.Array, Tail]:
        """On one device: the same of its shards; the tail is that of the whole sequence."""
        own = tail and tail._replace(x=self._own(tail.x))
        own_x = self._to_columns(x, "channels of the convolution")
        y, own = convolve(form, own_x, self._all_tokens(document), self._own(taps), own)
        return self._to_tokens(y), own._replace(x=self._all_columns(own.x))

    def check(self, length: int) -> None:
        """Raises UserError where the sequence cannot be dealt so."""
        self._order.check(length)

    def stretched(self, times: int) -> RecurrenceParallel:
        """The same for a sequence that has so many tokens in the place of each of this one, in the same order."""
        striped = isinstance(self.layout, Striped)
        return replace(self, layout=replace(self.layout, stripe=self.layout.stripe * times)) if striped else self

    def _to_columns(self, x, which: str):
        """All tokens in the order of the sequence, and a share of the columns of that name."""
        if x.shape[-1] % self.shards:
            raise UserError(
                f"{type(self).__name__} deals the {which} to the {self.shards} devices of mesh axis {self.axis!r}, and "
                f"{x.shape[-1]} do not divide: use a multiple of {self.shards}, or StateScan, which deals no values, "
                "and channels only where taps reach farther than the tokens that a device holds in a row."
            )
        return self._order.restore(jax.lax.all_to_all(x, self.axis, split_axis=x.ndim - 1, concat_axis=1, tiled=True))

    def _to_tokens(self, x):
        return jax.lax.all_to_all(self._order.permute(x), self.axis, split_axis=1, concat_axis=x.ndim - 1, tiled=True)

    def _all_tokens(self, x):
        return self._order.restore(jax.lax.all_gather(x, self.axis, axis=1, tiled=True))

    def _all_columns(self, x):
        return jax.lax.all_gather(x, self.axis, axis=x.ndim - 1, tiled=True)

    def _own(self, x):
        """The columns of this device."""
        width = x.shape[-1] // self.shards
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.axis) * width, width, x.ndim - 1)

    @property
    def _order(self) -> Layout:
        return self.layout or Contiguous(self.shards)


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

    def shard_recur(self, recurrence, inputs, state):
        exchange, out = self.exchange or self._cheapest(inputs, state), []
        before_run = self._gather if exchange == "gather" else self._steps
        for run, part in enumerate(self._runs(inputs)):
            before, state = before_run(recurrence.summarise(part), state, ascending=run == 0)
            out.append(recurrence.run(part, before)[0])
        return jnp.concatenate(out, axis=1), state

    def shard_convolve(self, form, x, document, taps, tail):
        out, reach = [], taps.shape[0] - 1
        if reach > x.shape[1] // self.runs:
            return super().shard_convolve(form, x, document, taps, tail)
        tail = tail or Tail.empty(x, reach)
        for run, part in enumerate(self._runs((x, document))):
            # The tokens next to the run, be they padding: taps count places.
            end = Tail(*(x[:, x.shape[1] - reach :] for x in part))
            before = _choose(self._place(run == 0) > 0, self._from_earlier(end, 1, run == 0), tail)
            y, last = convolve(form, *part, taps, before)
            out.append(y)
            tail = self._from_last(end if run + 1 < self.runs else last, run == 0)
        return jnp.concatenate(out, axis=1), tail

    def _runs(self, tree) -> list:
        length = jax.tree.leaves(tree)[0].shape[1] // self.runs
        return [jax.tree.map(lambda x, i=i: x[:, i * length : (i + 1) * length], tree) for i in range(self.runs)]

    def _cheapest(self, inputs: Inputs, state: State) -> str:
        states, held = self.shards * state.memory.nbytes, inputs.k.nbytes + inputs.v.nbytes
        return "gather" if states <= held else "steps"

    # What follows gives: (the state before the run of this device, that after the runs of all), from the one before
    # all. Runs lie on the devices in ascending order, or in descending order.

    def _gather(self, summary: Summary, state: State, ascending: bool) -> tuple[State, State]:
        all_ = jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis), summary)
        all_ = all_ if ascending else jax.tree.map(lambda x: x[::-1], all_)
        after, before = jax.lax.scan(lambda state, summary: (summary.after(state), state), state, all_)
        return jax.tree.map(lambda x: x[self._place(ascending)], before), after

    def _steps(self, summary: Summary, state: State, ascending: bool) -> tuple[State, State]:
        place, distance = self._place(ascending), 1
        while distance < self.shards:
            composed = self._from_earlier(summary, distance, ascending).then(summary)
            summary = _choose(place >= distance, composed, summary)
            distance *= 2
        before = _choose(place > 0, self._from_earlier(summary, 1, ascending).after(state), state)
        return before, self._from_last(summary.after(state), ascending)

    def _place(self, ascending: bool):
        index = jax.lax.axis_index(self.axis)
        return index if ascending else self.shards - 1 - index

    def _from_earlier(self, tree, distance: int, ascending: bool):
        """What the device so many places before this one has; zeros where there is none."""
        pairs = [(place, place + distance) for place in range(self.shards - distance)]
        pairs = pairs if ascending else [(self.shards - 1 - i, self.shards - 1 - j) for i, j in pairs]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)

    def _from_last(self, tree, ascending: bool):
        last = _choose(self._place(ascending) == self.shards - 1, tree, jax.tree.map(jnp.zeros_like, tree))
        return jax.tree.map(lambda x: jax.lax.psum(x, self.axis), last)


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

    def shard_recur(self, recurrence, inputs, state):
        gathered = jax.tree.map(self._all_tokens, inputs._replace(v=None))
        own = state._replace(memory=self._own(state.memory))
        out, own = recurrence.run(gathered._replace(v=self._to_columns(inputs.v, "columns of the values")), own)
        return self._to_tokens(out), own._replace(memory=self._all_columns(own.memory))


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

    def check(self, length):
        unit = self.layout.unit * self.shards
        if length % unit:
            raise UserError(
                f"{self.layout} becomes contiguous by one all-to-all where the length is a multiple of stripe x shards "
                f"x shards = {unit}, and it is {length}: use {-(-length // unit) * unit}, a smaller stripe, or "
                "ValueColumns."
            )

    def shard_recur(self, recurrence, inputs, state):
        out, state = self._inner.shard_recur(recurrence, jax.tree.map(self._to_run, inputs), state)
        return self._to_stripes(out), state

    def shard_convolve(self, form, x, document, taps, tail):
        if taps.shape[0] > x.shape[1]:
            return super().shard_convolve(form, x, document, taps, tail)
        y, tail = self._inner.shard_convolve(form, self._to_run(x), self._to_run(document), taps, tail)
        return self._to_stripes(y), tail

    @property
    def _inner(self) -> StateScan:
        return StateScan(self.mesh, self.axis, self.batch, self.heads, exchange=self.exchange)

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


def _choose(condition, tree, otherwise):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, otherwise)


def _check_shards(parallel: RecurrenceParallel) -> None:
    if parallel.layout and parallel.layout.shards != parallel.shards:
        raise UserError(
            f"{parallel.layout} is for {parallel.layout.shards} shards, and mesh axis {parallel.axis!r} has "
            f"{parallel.shards} devices: they have to agree."
        )
