"""Ulysses: an all-to-all turns shards of the sequence into shards of the heads (Jacobs et al. 2023).

Each device attends with the whole sequence for its share of the heads, so that any mask and any order of the tokens is
balanced; two all-to-alls a pass move O(length / devices). RingUlysses (Fang and Zhao 2024) does so along one mesh axis,
of fast links, and goes around a ring along another, of slow ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from striate.lib.attention import Local
from striate.lib.errors import UserError
from striate.lib.parallel.ring import Ring
from striate.lib.parallel.sharding import SequenceParallel


@dataclass(frozen=True)
class Ulysses(SequenceParallel):
    """Heads are dealt to the devices of the sequence axis; the query heads of a device are a multiple of them.

    Key/value heads that are fewer are repeated as far as needed, before they travel.
    """

    def shard_forward(self, task, score, q, k, v, query_fields, key_fields):
        out, lse = self._inner.shard_forward(
            task, self._own(score, q), *self._to_heads(q, k, v), *self._gather((query_fields, key_fields))
        )
        return self._to_sequence(out), self._to_sequence(lse)

    def shard_backward(self, task, score, q, k, v, query_fields, key_fields, d_out, lse, delta):
        rows = (self._exchange(x, from_axis=2, to_axis=1) for x in (d_out, lse, delta))
        d_own, dq, dk, dv = self._inner.shard_backward(
            task._replace(gradients=jnp.float32),
            self._own(score, q),
            *self._to_heads(q, k, v),
            *self._gather((query_fields, key_fields)),
            *rows,
        )
        kv_heads = k.shape[2]
        dq, dk, dv = (self._to_sequence(x) for x in (dq, dk, dv))
        dk, dv = (x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3]).sum(3) for x in (dk, dv))
        return jax.tree.map(self._put, score, d_own), dq, dk, dv

    @property
    def _devices(self) -> int:
        return self.mesh.shape[self.axis]

    @property
    def _inner(self):
        """What attends when every device has all tokens of its part of the sequence."""
        return _Whole()

    def _to_heads(self, q, k, v):
        heads, kv_heads = q.shape[2], k.shape[2]
        if heads % self._devices:
            raise UserError(
                f"{type(self).__name__} deals the heads to the {self._devices} devices of mesh axis {self.axis!r}, and "
                f"{heads} heads do not divide: use Ring or AllGather, or another number of heads."
            )
        repeats = math.lcm(kv_heads, self._devices) // kv_heads
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
        return tuple(self._exchange(x, from_axis=2, to_axis=1) for x in (q, k, v))

    def _to_sequence(self, x):
        return self._exchange(x, from_axis=1, to_axis=2)

    def _exchange(self, x, from_axis: int, to_axis: int):
        return jax.lax.all_to_all(x, self.axis, split_axis=from_axis, concat_axis=to_axis, tiled=True)

    def _gather(self, tree):
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis, axis=1, tiled=True), tree)

    def _own(self, score, q):
        """The parameters of the heads that are this device's."""

        def cut(x):
            own = x.shape[0] // self._devices
            return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.axis) * own, own)

        return jax.tree.map(lambda x: cut(x) if x.ndim else x, score)

    def _put(self, x, own):
        """The gradient of a parameter, from that of this device's heads."""
        if not x.ndim:
            return own
        start = jax.lax.axis_index(self.axis) * own.shape[0]
        return jax.lax.dynamic_update_slice_in_dim(jnp.zeros(x.shape, own.dtype), own, start, 0)


@dataclass(frozen=True)
class RingUlysses(Ulysses):
    """Ulysses along `axis`, Ring along `ring_axis`; the sequence is cut over `ring_axis` first.

    For meshes whose links differ: `axis` where they are fast, `ring_axis` where they are slow. A layout has as many
    shards as both axes together.
    """

    rings: ClassVar[bool] = True

    ring_axis: str = "ring"

    def __post_init__(self):
        super().__post_init__()
        if self.ring_axis not in self.mesh.shape or self.ring_axis == self.axis:
            raise UserError(
                f"RingUlysses goes around the mesh axis {self.ring_axis!r} and deals heads over {self.axis!r}, but the "
                f"mesh has {dict(self.mesh.shape)}: name two of these axes."
            )

    @property
    def sequence_axes(self) -> tuple[str, ...]:
        return self.ring_axis, self.axis

    @property
    def _inner(self):
        return Ring(self.mesh, self.ring_axis, self.batch, self.heads)


class _Whole:
    """One device that holds the whole sequence, called as a shard of one."""

    shard_forward = staticmethod(Local().forward)
    shard_backward = staticmethod(Local().backward)
