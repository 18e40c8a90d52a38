"""Sums that are gathered in HBM while a kernel's steps come by in any order."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class Gathered(NamedTuple):
    """Sums in HBM to whose blocks the steps add, in any order, by copies that run beside the work.

    A step finds its block in one of three slots of VMEM. While it works the block of the next step is read into
    another, and the block of the step before is still being written back from the third. What makes that safe:

      - a block that the next step has too stays in its slot;
      - a slot is read into after what it held before was written back;
      - a block that was written back last is read after that write is done.
    """

    hbm: Any  # (B, H, T, D) float32
    slots: Any  # (3, block length, D) float32
    reads: Any  # a semaphore for each slot
    writes: Any
    state: Any  # int32: which slot is current; for each slot, whether a write is under way, and the place it holds

    CURRENT, WRITING, PLACE = 0, 1, 4

    @staticmethod
    def scratch_shapes(block: tuple[int, int]):
        return [
            pltpu.VMEM((3, *block), jnp.float32),
            pltpu.SemaphoreType.DMA((3,)),
            pltpu.SemaphoreType.DMA((3,)),
            pltpu.SMEM((4 + 3 * 3,), jnp.int32),
        ]

    def enter(self, place, next_place, begin, end):
        """The slot that holds the block at `place`. The read of the next one is under way from here on."""
        state, current = self.state, self.CURRENT

        @pl.when(begin)
        def _():
            state[current] = 0
            for slot in range(3):
                state[self.WRITING + slot] = 0
            self._hold(0, place)
            self._copy(0, place, read=True).start()
            self._copy(0, place, read=True).wait()

        slot = state[current]
        fresh = ~begin & ~self._holds(slot, place)

        @pl.when(fresh)
        def _():
            following = (slot + 1) % 3
            self._copy(following, place, read=True).wait()
            state[current] = following

        slot = state[current]

        @pl.when(~end & ~self._same(place, next_place))
        def _():
            following, before = (slot + 1) % 3, (slot + 2) % 3
            self._drain(following)
            self._settle(before, next_place)
            self._hold(following, next_place)
            self._copy(following, next_place, read=True).start()

        return slot

    def leave(self, place, next_place, end):
        """The block is written back, unless the next step goes on with it."""
        slot = self.state[self.CURRENT]

        @pl.when(end | ~self._same(place, next_place))
        def _():
            self._copy(slot, place, read=False).start()
            self.state[self.WRITING + slot] = 1

        @pl.when(end)
        def _():
            for slot in range(3):
                self._drain(slot)

    def _copy(self, slot, place, read: bool):
        batch, head, block = place
        length = self.slots.shape[1]
        there, here = self.hbm.at[batch, head, pl.ds(block * length, length)], self.slots.at[slot]
        if read:
            return pltpu.make_async_copy(there, here, self.reads.at[slot])
        return pltpu.make_async_copy(here, there, self.writes.at[slot])

    def _drain(self, slot):
        state = self.state

        @pl.when(state[self.WRITING + slot] == 1)
        def _():
            held = [state[self.PLACE + 3 * slot + i] for i in range(3)]
            self._copy(slot, held, read=False).wait()
            state[self.WRITING + slot] = 0

    def _settle(self, slot, place):
        """If the slot holds that block, the write of it is done from here on."""
        pl.when(self._holds(slot, place))(lambda: self._drain(slot))

    def _hold(self, slot, place):
        for i, x in enumerate(place):
            self.state[self.PLACE + 3 * slot + i] = x

    def _holds(self, slot, place):
        return self._same([self.state[self.PLACE + 3 * slot + i] for i in range(3)], place)

    @staticmethod
    def _same(place, other):
        (a, b, c), (d, e, f) = place, other
        return (a == d) & (b == e) & (c == f)
