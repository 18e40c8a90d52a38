"""Passes around a ring of TPUs as one kernel each: keys travel while a device attends to those it holds.

Where every offset has work, half of the keys of each shard goes one way and half the other: N - 1 hops of half the
bytes, so that both directions of a torus carry. A device then holds, at step s, one half of the keys of device i - s
and the other of device i + s; they are a shard like any other, whose fields say which tokens these are. Where the
farthest offset is no more than half the ring, all go one way, in as many hops.

What is to be done is known before the kernel starts: the fields of all keys, 4 bytes a token each, are gathered, and
every step has its list of live blocks.

Chips of two cores split the heads; the first core alone talks to the neighbours, and the cores wait for each other
between the steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.extend
from jax.experimental.pallas import tpu as pltpu

from striate.lib.tiles import Partial
from striate.pallas_kernels.common import flatten, stacked
from striate.pallas_kernels.tpu.around import Lists
from striate.pallas_kernels.tpu.attention import Kernel, one_at_a_time
from striate.pallas_kernels.tpu.chips import cores
from striate.pallas_kernels.tpu.ring_backward import backward
from striate.pallas_kernels.tpu.ring_forward import forward
from striate.pallas_kernels.tpu.steps import quarters
from striate.pallas_kernels.tpu.traffic import Route


@dataclass(frozen=True)
class Fused(Kernel):
    """Attention by the kernels of this folder, where a pass around a ring is one of them."""

    fused: ClassVar[bool] = True

    def ring_forward(self, axis: str, shards: int, farthest: int, score, q, k, v, query_fields, key_fields):
        route = Route.of(axis, shards, farthest, k.shape[2], self.tile[1])
        lists, names, fields = self._passing(route, score, query_fields, key_fields, transposed=False)
        partial = Partial.empty(q, v.shape[-1])
        maximum, total, weighted = map(flatten, partial)
        around = one_at_a_time(forward, self, names, route)
        carry = maximum[:, :, None], total[:, :, None], weighted
        done = around(score, *lists, flatten(q), k, v, *fields, carry)
        return Partial(*(x.reshape(like.shape) for x, like in zip(done, partial, strict=True)))

    def ring_backward(self, axis, shards, farthest, score, q, k, v, d_out, lse, delta, query_fields, key_fields):
        route = Route.of(axis, shards, farthest, k.shape[2], self.tile[1])
        lists, names, fields = self._passing(route, score, query_fields, key_fields, transposed=True)
        around = one_at_a_time(backward, self, names, route)
        dq, dk, dv, d_score = around(score, *lists, *self._rows(q, d_out, lse, delta), k, v, *fields)
        return (dq.reshape(q.shape), d_score), dk, dv

    def _passing(self, route: Route, score, query_fields, key_fields, transposed: bool):
        """(the lists of the steps, names of the fields, those of queries, of the keys at each step)."""
        key_fields = jax.tree.map(route.passing, key_fields)
        lists = Lists.of(jax.vmap(lambda keys: quarters(self, query_fields, keys, transposed))(key_fields))
        names, query_fields, _ = stacked(self.mask, score, query_fields, jax.tree.map(lambda x: x[0], key_fields))
        return lists, names, (query_fields, jax.vmap(lambda keys: stacked(self.mask, score, keys, keys)[2])(key_fields))

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
