"""The forward pass around a ring of TPUs, one kernel.

At step s, of H + 1, beside what lib/parallel/ring.py says of a ring,

    for each way:   wait until the neighbour's other slot is free     (not at step 0: the barrier has seen to that)
                    copy this slot's keys of that way into it, over the link
    attend to this slot: a pipeline over the list of its live blocks, carries (m, l, acc) in HBM
    for each way:   wait until the copy is gone, and that of the other neighbour is here
                    tell that neighbour that this slot is free        (unless it has nothing left to send)
"""

from __future__ import annotations

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from striate.pallas_kernels.tpu.around import Lists, call, own
from striate.pallas_kernels.tpu.forward import Steps
from striate.pallas_kernels.tpu.traffic import Keys, Route

COLLECTIVE = 0


def forward(kernel, names, route: Route, score, row, code, count, q, k, v, query_fields, key_fields, carry):
    """As the forward of one device; the lists are those of all steps, key_fields (steps, B, names, S)."""
    walk = Steps.of(kernel, names, score, q, k, v, resume=True)
    given = (q, k, v, query_fields, key_fields, *walk.leaves)
    body = functools.partial(_around, route, walk)
    scratch = [*Keys.semaphores(len(route.ways)), *walk.scratch_shapes]
    lists, slots = (row, code, count), Keys.slots_of(k, v)
    return call(kernel, body, q.shape[1], lists, given, carry, slots, scratch, COLLECTIVE, name="striate_ring_forward")[
        :3
    ]


def _around(route: Route, walk: Steps, cores: int, lists: Lists, *refs):
    given, refs = refs[: 5 + len(walk.leaves)], refs[5 + len(walk.leaves) :]
    q, k, v, query_fields, key_fields, *leaves = given
    (_, _, _, *carry), slots, semaphores, scratch = refs[:6], refs[6:8], refs[8:14], refs[14:]
    core, heads, keys = pl.program_id(0), q.shape[1] // cores, Keys(route, slots, *semaphores)
    talks = pl.when(core == 0)

    def attend(step):
        row, code, count = lists.at(step)
        of_given, of_carry = (own(specs, core * heads, row, code) for specs in (walk.of_given, walk.of_results))
        pipeline = pltpu.emit_pipeline(
            lambda *blocks: walk.body(row, code, *blocks, *scratch),
            grid=(heads, count),
            in_specs=[*of_given, *of_carry],
            out_specs=of_carry,
        )
        pipeline(q, *keys.at(step), query_fields, key_fields.at[step], *leaves, *carry, *carry)

    def hop(step, _):
        talks(lambda: keys.send(step))
        attend(step)
        keys.meet(core, cores)
        talks(lambda: keys.receive(step))
        keys.meet(core, cores)

    talks(lambda: keys.begin(k, v))
    keys.meet(core, cores)
    jax.lax.fori_loop(0, route.hops + 1, hop, None)
    talks(keys.end)
