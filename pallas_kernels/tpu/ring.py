"""A pass around a ring of TPUs as one kernel: keys travel to the neighbours while a device attends to those it holds.

A device holds two slots of keys in HBM. At step s, of H + 1,

    for each way:   wait until the neighbour's other slot is free     (not at step 0: the barrier has seen to that)
                    copy this slot's keys of that way into it, over the link
    attend to this slot: a pipeline over the list of its live blocks, carries (m, l, acc) in HBM
    for each way:   wait until the copy is gone, and that of the other neighbour is here
                    tell that neighbour that this slot is free        (unless it has nothing left to send)

Where every offset has work, half of the keys of each shard goes one way and half the other: H = N - 1 hops of half the
bytes, so that both directions of a torus carry. A slot then holds, at step s, one half of the keys of device i - s and
the other of device i + s; it is a shard like any other, whose fields say which tokens these are. Where the farthest
offset is no more than half the ring, all go one way, in as many hops.

What is to be done is known before the kernel starts: the fields of all keys, 4 bytes a token each, are gathered, and
every step has its list of live blocks.

Chips of two cores split the heads; the first core alone talks to the neighbours, and tells the second when a slot is
here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from striate.lib.tiles import Partial
from striate.pallas_kernels.tpu import forward, steps
from striate.pallas_kernels.tpu.attention import Kernel, _flatten, _one_at_a_time
from striate.pallas_kernels.tpu.chips import cores
from striate.pallas_kernels.tpu.parts import blocks, like

FORWARD = 0  # identifies the barrier of all devices that run this kernel


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


@dataclass(frozen=True)
class Fused(Kernel):
    """Attention by the kernels of this folder, where a pass around a ring is one of them."""

    fused: ClassVar[bool] = True

    def ring_forward(self, axis: str, shards: int, farthest: int, score, q, k, v, query_fields, key_fields) -> Partial:
        """As `forward`, from nothing, over the keys of the devices at all offsets up to the farthest."""
        route = Route.of(axis, shards, farthest, k.shape[2], self.tile[1])
        key_fields = jax.tree.map(route.passing, key_fields)
        lists = _lists(jax.vmap(lambda keys: self.verdicts(query_fields, keys))(key_fields))
        names, query_fields, _ = self._fields(score, query_fields, jax.tree.map(lambda x: x[0], key_fields))
        key_fields = jax.vmap(lambda keys: self._fields(score, keys, keys)[2])(key_fields)
        partial = Partial.empty(q, v.shape[-1])
        maximum, total, weighted = map(_flatten, partial)
        around = _one_at_a_time(_forward, self, names, route)
        carry = maximum[:, :, None], total[:, :, None], weighted
        done = around(score, *lists, _flatten(q), k, v, query_fields, key_fields, carry)
        return Partial(*(x.reshape(like.shape) for x, like in zip(done, partial, strict=True)))

    def traced(self, call):
        return call

    @property
    def cores(self) -> int:
        return self.interpret.num_cores_per_device if self.interpret else cores()


@dataclass(frozen=True)
class FusedInterpreted(Fused):
    """The same, step by step on any device."""

    interpret: ClassVar[Any] = pltpu.InterpretParams()

    def traced(self, call):
        """A pipeline inside a kernel asks for which chip it is, also where it is interpreted: for some chip, then."""

        def run(*arrays):
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
            some = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
            with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh().update(abstract_device=some)):
                traced = jax.make_jaxpr(call)(*shapes)
            return jax.extend.core.jaxpr_as_fun(traced)(*arrays)

        return run


def _lists(verdict_SBRC):
    """(row, code, count), int32: those of every step of the ring, one after the other."""
    longest = verdict_SBRC.size
    if longest > steps.LONGEST:
        raise NotImplementedError(
            f"'pallas_tpu_fused' keeps the lists of all blocks that a device meets on the way around the ring in the "
            f"memory of the scalar core, {longest} here, and at most {steps.LONGEST} fit: use 'pallas_tpu'."
        )
    row, code, count = jax.vmap(steps.live_steps)(verdict_SBRC)
    return row.reshape(-1), code.reshape(-1), count.reshape(-1)


def _forward(kernel: Fused, names, route: Route, score, row, code, count, q, k, v, query_fields, key_fields, carry):
    """The kernel's call. key_fields are (steps, B, names, S), carry as in forward.forward; from there also the rest."""
    walk = forward.Steps.of(kernel, names, score, q, k, v, resume=True)
    given = (q, k, v, query_fields, key_fields, *walk.leaves)
    split = kernel.cores if q.shape[1] % kernel.cores == 0 else 1
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    slots = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in (k, v)]
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(split,),
        in_specs=[in_place] * (len(given) + 3),
        out_specs=[in_place] * 5,
        scratch_shapes=[*Traffic.semaphores(len(route.ways)), *walk.scratch_shapes],
    )
    call = pl.pallas_call(
        functools.partial(_around, route, walk, split),
        grid_spec=spec,
        out_shape=[*map(like, carry), *slots],
        input_output_aliases={3 + len(given) + i: i for i in range(3)},
        interpret=kernel.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=blocks().vmem, collective_id=FORWARD
        ),
        name="striate_ring_forward",
    )
    return kernel.traced(call)(row, code, count, *given, *carry)[:3]


def _around(route: Route, walk: forward.Steps, split: int, row_ref, code_ref, count_ref, *refs):
    given, refs = refs[: 5 + len(walk.leaves)], refs[5 + len(walk.leaves) :]
    q, k, v, query_fields, key_fields, *leaves = given
    (_, _, _, *carry), slots, semaphores, scratch = refs[:6], refs[6:8], refs[8:14], refs[14:]
    heads, length = q.shape[1] // split, row_ref.shape[0] // (route.hops + 1)
    core, traffic = pl.program_id(0), Traffic(route, slots, *semaphores)
    talks = pl.when(core == 0)

    def attend(step):
        row, code = (Part(ref, step * length) for ref in (row_ref, code_ref))

        def own(spec):
            return pl.BlockSpec(spec.block_shape, lambda h, i: spec.index_map(core * heads + h, i, row, code))

        def body(*refs):
            walk.body(row, code, *refs, *scratch)

        of_given, of_carry = ([own(spec) for spec in specs] for specs in (walk.of_given, walk.of_results))
        grid, here = (heads, count_ref[step]), [slot.at[step % 2] for slot in slots]
        pipeline = pltpu.emit_pipeline(body, grid=grid, in_specs=[*of_given, *of_carry], out_specs=of_carry)
        pipeline(q, *here, query_fields, key_fields.at[step], *leaves, *carry, *carry)

    def hop(step, _):
        talks(lambda: traffic.send(step))
        attend(step)
        traffic.meet(core, split)
        talks(lambda: traffic.receive(step))
        traffic.meet(core, split)

    talks(lambda: traffic.begin(k, v))
    traffic.meet(core, split)
    jax.lax.fori_loop(0, route.hops + 1, hop, None)
    talks(traffic.end)


class Part(NamedTuple):
    """A list in the memory of the scalar core, from some place on."""

    ref: Any
    start: Any

    def __getitem__(self, i):
        return self.ref[self.start + i]


class Traffic(NamedTuple):
    """What a device sends to its neighbours and gets from them. All semaphores are at zero in the end."""

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

    def begin(self, k, v):
        """The device's own keys are in the first slot, and the neighbours in this kernel, from here on."""
        own = [
            pltpu.make_async_copy(x, slot.at[0], self.begun.at[i])
            for i, (x, slot) in enumerate(zip((k, v), self.slots, strict=True))
        ]
        for copy in own:
            copy.start()
        if self.route.hops:
            barrier = pltpu.get_barrier_semaphore()
            self._tell_both(barrier)
            pl.semaphore_wait(barrier, 2)
            self._tell_both(self.known)
        for copy in own:
            copy.wait()

    def end(self):
        """Neighbours do not take what this device says at the start of the next such kernel for this one's."""
        if self.route.hops:
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
