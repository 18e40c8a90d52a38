"""The backward pass around a ring of TPUs, one kernel.

Keys travel as in the forward pass. The float32 gradients of a shard of keys travel after it, a step behind: at step s,
of H + 1,

    send the keys of this step on, and the gradients gathered up to step s - 1
    compute dk, dv of this step's keys, and add to dq: a pipeline over the list of their live blocks
    wait for what the other neighbour has gathered for these keys, and add dk, dv to it

and after the last step a copy takes every gradient home. dq stays, in HBM.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from striate.lib.tiles import zeros
from striate.pallas_kernels.tpu.around import Lists, call, own
from striate.pallas_kernels.tpu.backward import Steps
from striate.pallas_kernels.tpu.parts import of_parameters
from striate.pallas_kernels.tpu.traffic import Followers, Keys, Route

COLLECTIVE = 1


def backward(kernel, names, route: Route, score, row, code, count, q, d_out, lse, delta, k, v, *rest):
    """(dq, dk, dv, the gradients of the score): as the backward of one device, for dq and d_score of zeros.

    The lists are those of all steps, key_fields (steps, B, names, S).
    """
    query_fields, key_fields = rest
    walk = Steps.of(kernel, names, score, q, k, v)
    given = (q, d_out, lse, delta, k, v, query_fields, key_fields, *walk.leaves)
    arriving, new = ([zeros(x.shape, q) for x in (k, v)] for _ in range(2))
    shares = [zeros((route.hops + 1, *shape), q) for shape in walk.shares]
    leaving = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (k, v)]
    ways = len(route.ways)
    scratch = [*Keys.semaphores(ways), *Followers.semaphores(ways), *walk.scratch_shapes]
    results, fresh = (zeros(q.shape, q), *arriving, *new, *shares), (*leaving, *Keys.slots_of(k, v))
    body, lists = functools.partial(_around, route, walk), (row, code, count)
    dq, dk, dv, _, _, *shares = call(
        kernel, body, k.shape[1], lists, given, results, fresh, scratch, COLLECTIVE, name="striate_ring_backward"
    )[: len(results)]
    return dq, dk, dv, of_parameters(score, [x.sum(0) for x in shares])


def _around(route: Route, walk: Steps, cores: int, lists: Lists, *refs):
    of_score = len(walk.leaves)
    given, refs = refs[: 8 + of_score], refs[8 + of_score :]
    q, d_out, lse, delta, k, v, query_fields, key_fields, *leaves = given
    results, refs = refs[5 + of_score :][: 5 + of_score], refs[2 * (5 + of_score) :]
    dq, arriving, new, shares = results[0], results[1:3], results[3:5], results[5:]
    leaving, slots, refs = refs[:2], refs[2:4], refs[4:]
    keys, followers = Keys(route, slots, *refs[:6]), Followers(route, leaving, arriving, *refs[6:10])
    core, heads, scratch = pl.program_id(0), k.shape[1] // cores, refs[10:]
    talks = pl.when(core == 0)

    def gradients(step):
        row, code, count = lists.at(step)
        of = (own(specs, core * heads, row, code) for specs in (walk.of_given, walk.of_gradients, walk.of_shares))
        of_given, of_gradients, of_shares = of

        def body(*blocks):
            unused = (None,) * 3
            before, after = blocks[: len(given)], blocks[len(given) :]
            walk.body(core * heads, row, code, *before, *unused, dq, *after, *scratch)

        pipeline = pltpu.emit_pipeline(
            body,
            grid=(heads, count, q.shape[1] // k.shape[1]),
            in_specs=of_given,
            out_specs=[*of_gradients, *of_shares],
        )
        rows, fields = (q, d_out, lse, delta), (query_fields, key_fields.at[step])
        pipeline(*rows, *keys.at(step), *fields, *leaves, *new, *[x.at[step] for x in shares])

    def hop(step, _):
        talks(lambda: keys.send(step))
        talks(lambda: followers.send(step))
        gradients(step)
        talks(lambda: followers.receive(step))
        keys.meet(core, cores)
        _add(arriving, new, leaving, core * heads, heads, walk.of_gradients[0].block_shape[2])
        keys.meet(core, cores)
        talks(lambda: followers.added(step))
        talks(lambda: keys.receive(step))
        keys.meet(core, cores)

    talks(lambda: keys.begin(k, v))
    keys.meet(core, cores)
    jax.lax.fori_loop(0, route.hops + 1, hop, None)
    talks(followers.go_home)
    talks(keys.end)


def _add(arriving, new, leaving, first_head, heads: int, rows: int):
    """leaving = arriving + new for some of the heads, and new is zeros again: blocks of keys without work stay so."""

    def body(*blocks):
        arrived, added, sums, cleared = blocks[:2], blocks[2:4], blocks[4:6], blocks[6:]
        for a, b, c, d in zip(arrived, added, sums, cleared, strict=True):
            c[...], d[...] = a[...] + b[...], jnp.zeros_like(d)

    of_both = [pl.BlockSpec((None, None, rows, x.shape[3]), lambda b, h, i: (b, first_head + h, i, 0)) for x in leaving]
    batch, _, length, _ = leaving[0].shape
    pipeline = pltpu.emit_pipeline(
        body, grid=(batch, heads, length // rows), in_specs=of_both * 2, out_specs=of_both * 2
    )
    pipeline(*arriving, *new, *leaving, *new)
