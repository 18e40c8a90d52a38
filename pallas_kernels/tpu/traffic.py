"""How keys, and the gradients of keys, travel around a ring of TPUs from inside a kernel.

Keys lie in two slots of HBM. While a slot is attended to, it is copied into the other slot of the neighbours, who have
said before that this one is free. Gradients of keys follow one step behind: what is to travel lies in one array, what
has arrived in another.

A device may be ahead of its neighbours, never by more than they gave it leave for; semaphores count, and are at zero
in the end. A kernel begins with a barrier, since a copy into a device that is not there yet has no place to go; it ends
when both neighbours are known to have passed theirs, since the barrier of the next kernel would count twice a neighbour
that is two kernels ahead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class Way(NamedTuple):
    """Keys that travel in one direction: rows [start, start + length) of every shard, by `toward` devices a hop."""

    toward: int
    start: int
    length: int


class Route(NamedTuple):
    """How keys go around a ring. Static."""

    axis: str
    shards: int
    hops: int
    ways: tuple[Way, ...]

    @classmethod
    def of(cls, axis: str, shards: int, farthest: int, keys: int, tile: int) -> Route:
        """The one that brings the keys up to the offset `farthest`, with the fewest bytes on the busiest link."""
        half = keys // tile // 2 * tile
        if 2 * farthest < shards or not half:
            return cls(axis, shards, farthest, (Way(1, 0, keys),))
        return cls(axis, shards, shards - 1, (Way(1, 0, keys - half), Way(-1, keys - half, half)))

    def neighbour(self, toward: int):
        return {self.axis: (jax.lax.axis_index(self.axis) + toward) % self.shards}

    def passing(self, x_BS):
        """What there is for each key, (B, S), as it passes by: (steps, B, S)."""
        here, of_all = jax.lax.axis_index(self.axis), jax.lax.all_gather(x_BS, self.axis)

        def of_way(way: Way):
            born = (here - way.toward * jnp.arange(self.hops + 1)) % self.shards
            return of_all[..., way.start : way.start + way.length][born]

        return jnp.concatenate([of_way(way) for way in self.ways], axis=-1)


class Keys(NamedTuple):
    """The keys that a device attends to at a step, and passes on."""

    route: Route
    slots: Any  # of k and of v, (2, B, K, S, width) in HBM
    gone: Any  # for each way, k and v: what has left this device
    here: Any  # what has arrived
    free: Any  # for each way: how often the neighbour to whom we send has freed a slot
    begun: Any  # copies of the device's own keys
    known: Any  # how many neighbours know that their neighbours are in this kernel
    met: Any  # what the cores of this device have done

    @staticmethod
    def semaphores(ways: int):
        dma, regular = pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.REGULAR
        return [dma((ways, 2)), dma((ways, 2)), regular((ways,)), dma((2,)), regular, regular]

    @staticmethod
    def slots_of(*arrays):
        return [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in arrays]

    def at(self, step):
        """(k, v) of a step."""
        return [slot.at[step % 2] for slot in self.slots]

    def begin(self, k, v):
        """The device's own keys are in the first slot, and the neighbours in this kernel, from here on."""
        own = [
            pltpu.make_async_copy(x, slot.at[0], self.begun.at[i])
            for i, (x, slot) in enumerate(zip((k, v), self.slots, strict=True))
        ]
        for copy in own:
            copy.start()
        barrier = pltpu.get_barrier_semaphore()
        self._tell_both(barrier)
        pl.semaphore_wait(barrier, 2)
        self._tell_both(self.known)
        for copy in own:
            copy.wait()

    def end(self):
        """Neighbours do not take what this device says at the start of the next such kernel for this one's."""
        pl.semaphore_wait(self.known, 2)

    def send(self, step):
        """The slot of this step is on its way to the neighbours."""

        @pl.when(step < self.route.hops)
        def _():
            for number in range(len(self.route.ways)):
                pl.when(step > 0)(lambda number=number: self.await_leave(number))
                for copy in self._copies(step, number):
                    copy.start()

    def receive(self, step):
        """The slot of the next step is here; that of this step is free."""

        @pl.when(step < self.route.hops)
        def _():
            for number in range(len(self.route.ways)):
                for copy in self._copies(step, number):
                    copy.wait()
                pl.when(step < self.route.hops - 1)(lambda number=number: self.give_leave(number))

    def await_leave(self, way: int):
        pl.semaphore_wait(self.free.at[way], 1)

    def give_leave(self, way: int):
        upstream = self.route.neighbour(-self.route.ways[way].toward)
        pl.semaphore_signal(self.free.at[way], 1, device_id=upstream)

    def meet(self, core, cores: int):
        """Both cores of the device are here."""
        if cores == 2:
            pl.semaphore_signal(self.met, 1, core_index=1 - core)
            pl.semaphore_wait(self.met, 1)

    def _tell_both(self, semaphore):
        for toward in (1, -1):
            pl.semaphore_signal(semaphore, 1, device_id=self.route.neighbour(toward))

    def _copies(self, step, number: int):
        way = self.route.ways[number]
        rows = pl.ds(way.start, way.length)
        return [
            pltpu.make_async_remote_copy(
                slot.at[step % 2, :, :, rows],
                slot.at[(step + 1) % 2, :, :, rows],
                self.gone.at[number, i],
                self.here.at[number, i],
                device_id=self.route.neighbour(way.toward),
            )
            for i, slot in enumerate(self.slots)
        ]


class Followers(NamedTuple):
    """The gradients of keys, which travel a step behind these and are added to at each device.

    A step sends on what was gathered up to the step before, and when that of the other neighbour is here adds to it. A
    last copy takes all to their owners: to the device `hops` back.
    """

    route: Route
    leaving: Any  # of dk and of dv, (B, K, S, width) float32 in HBM
    arriving: Any
    gone: Any  # for each way, dk and dv
    here: Any
    free: Any  # for each way: how often the neighbour to whom we send has added what had arrived
    home: Any  # for each way: whether the device to whom the last copy goes has

    @staticmethod
    def semaphores(ways: int):
        dma, regular = pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.REGULAR
        return [dma((ways, 2)), dma((ways, 2)), regular((ways,)), regular((ways,))]

    def send(self, step):
        """What was gathered up to the step before is on its way."""

        @pl.when(step > 0)
        def _():
            for number in range(len(self.route.ways)):
                self.await_leave(self.free, number)
                for copy in self._copies(number, 1):
                    copy.start()

    def receive(self, step):
        """What the other neighbour has gathered for the keys of this step is here; what was sent may be written to."""

        @pl.when(step > 0)
        def _():
            for number in range(len(self.route.ways)):
                for copy in self._copies(number, 1):
                    copy.wait()

    def added(self, step):
        """What has arrived may be written to."""
        # The device to whom `home` is signalled is in this kernel: the sends of each step took the leave of the next.
        for number in range(len(self.route.ways)):
            pl.when(step < self.route.hops)(lambda n=number: self.give_leave(self.free, n, -1))
            pl.when(step == self.route.hops)(lambda n=number: self.give_leave(self.home, n, self.route.hops))

    def go_home(self):
        """What has arrived is, from here on, the sum for the keys of this device."""
        for number in range(len(self.route.ways)):
            self.await_leave(self.home, number)
            for copy in self._copies(number, -self.route.hops):
                copy.start()
        for number in range(len(self.route.ways)):
            for copy in self._copies(number, -self.route.hops):
                copy.wait()

    def await_leave(self, semaphores, way: int):
        pl.semaphore_wait(semaphores.at[way], 1)

    def give_leave(self, semaphores, way: int, distance: int):
        pl.semaphore_signal(semaphores.at[way], 1, device_id=self._device(way, distance))

    def _device(self, way: int, distance: int):
        return self.route.neighbour(distance * self.route.ways[way].toward)

    def _copies(self, number: int, distance: int):
        way = self.route.ways[number]
        rows = pl.ds(way.start, way.length)
        return [
            pltpu.make_async_remote_copy(
                leaving.at[:, :, rows],
                arriving.at[:, :, rows],
                self.gone.at[number, i],
                self.here.at[number, i],
                device_id=self._device(number, distance),
            )
            for i, (leaving, arriving) in enumerate(zip(self.leaving, self.arriving, strict=True))
        ]
