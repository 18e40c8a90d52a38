"""Ring attention: queries stay, blocks of keys and values travel around the devices (Liu et al. 2023).

At offset s device i holds the keys that were born on device (i - s) mod N. The layout of the tokens decides how the
work is spread (striate.lib.layouts); this file is the same for every layout, because the mask reads Tokens, which
travel with the keys. Only offsets at which some device has work are visited, one hop from each to the next.

Forward: the next hop is issued before the compute of an offset, which does not depend on it; the partial results
(m, l, acc) stay in float32 on the device of their queries.

Backward: the keys travel as before; the float32 accumulators (dK, dV) of a block travel with it, and at the end one hop
takes each to its owner. They depend on the compute, hence move late: a step moves the accumulator of the step before
while it computes its own share, and adds that on arrival.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from striate.lib.errors import UserError
from striate.lib.masks import NONE, Mask
from striate.lib.parallel.sharding import SequenceParallel
from striate.lib.tiles import Partial, natural, zeros
from striate.lib.tokens import Tokens

# Of a step, for all heads of a round: some tenths of a millisecond of a TPU, which hide how the keys of a round travel.
LOGITS = 2**27
RUNS = 256  # of tokens, in which each shard is summarised to find where it has work


@dataclass(frozen=True)
class Ring(SequenceParallel):
    """Keys and values travel around the devices of the sequence axis; memory O(length / devices).

    Attributes:
      offsets: those that are visited, ascending; None for those at which some device has work, as far as the Tokens
        are known before the program runs (`for_tokens`), else all of them. What is given is checked as the program
        runs: where other offsets had work, the output is NaN.
      rounds: how often the ring is gone around, each time with a share of the heads: what is in memory beside the
        arrays themselves is divided by that. None for as many as leave a step enough work (`rounds_that_pay`).
    """

    rings: ClassVar[bool] = True  # what implementations of whole passes around a ring are for

    offsets: tuple[int, ...] | None = None
    rounds: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.offsets is not None and [*self.offsets] != sorted({o for o in self.offsets if 0 <= o < self.shards}):
            raise UserError(
                f"Ring got the offsets {self.offsets}; they are whole numbers from 0 to {self.shards - 1}, ascending."
            )

    def for_tokens(self, mask: Mask, q_tokens: Tokens, k_tokens: Tokens) -> Ring:
        """This ring with the offsets that have work for these Tokens, given in the order of the layout."""
        leaves = jax.tree.leaves((q_tokens, k_tokens))
        known = all(not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True) for x in leaves)
        if self.offsets is not None or not known or any(x.shape[1] % self.shards for x in leaves):
            return self
        return replace(self, offsets=live_offsets(mask, q_tokens, k_tokens, self.shards))

    def shard_forward(self, task, score, q, k, v, query_fields, key_fields):
        def attend(score, *arrays):
            return (), self._forward_round(task, score, *arrays, query_fields, key_fields)

        return _in_rounds(self._rounds(q, k), attend, score, (q, k, v))[1]

    def shard_backward(self, task, score, q, k, v, query_fields, key_fields, d_out, lse, delta):
        def gradients(score, q, k, v, *rows):
            d_score, *arrays = self._backward_round(task, score, q, k, v, query_fields, key_fields, *rows)
            wanted = (task.gradients or x.dtype for x in (q, k, v))
            return d_score, tuple(x.astype(dtype) for x, dtype in zip(arrays, wanted, strict=True))

        d_score, arrays = _in_rounds(self._rounds(q, k), gradients, score, (q, k, v, d_out, lse, delta))
        return d_score, *arrays

    def _forward_round(self, task, score, q, k, v, query_fields, key_fields):
        kv_heads, length = k.shape[2], q.shape[1]
        problem = task.plan(q, k)
        out_dtype, missed = v.dtype, self._missed(task.mask, query_fields, key_fields)
        q = problem.queries(score, q, kv_heads)
        query_fields, key_fields = problem.sides(score, query_fields, key_fields)
        block = self._key_block(problem, k, v, key_fields)
        if problem.fused and self._farthest:
            partial = problem.ring_forward(*self._span, score, q, *block[:2], query_fields, block[2])
        else:
            partial = self._forward(problem, score, q, block, query_fields)
        out, lse = partial.finish(problem.unit, score.normalised)
        out = jnp.where(missed, jnp.nan, natural(out, length))
        return out.astype(out_dtype), natural(lse, length)

    def _forward(self, problem, score, q, block, query_fields) -> Partial:
        def attend(block, partial):
            k, v, key_fields = block
            return problem.forward(score, q, k, v, query_fields, key_fields, partial)

        def step(hop: int, carry):
            block, partial = carry
            arriving = self._hop(block, hop)
            return arriving, attend(block, partial)

        partial = Partial.empty(q, block[1].shape[-1])
        first, *hops = self._hops
        block, partial = _in_runs(step, hops, (self._hop(block, first), partial))
        return attend(block, partial)

    def _backward_round(self, task, score, q, k, v, query_fields, key_fields, d_out, lse, delta):
        kv_heads, (length, keys) = k.shape[2], (q.shape[1], k.shape[1])
        problem = task.plan(q, k)
        rows = tuple(problem.rows(x, kv_heads) for x in (d_out, lse, delta))
        q = problem.queries(score, q, kv_heads)
        query_fields, key_fields = problem.sides(score, query_fields, key_fields)
        block = self._key_block(problem, k, v, key_fields)
        if problem.fused and self._farthest:
            span, (k, v, key_fields) = self._span, block
            sums, *accumulator = problem.ring_backward(*span, score, q, k, v, *rows, query_fields, key_fields)
        else:
            sums, accumulator = self._backward(problem, score, q, block, rows, query_fields)
        dq = natural(problem.finish_dq(sums[0], q), length)
        dk, dv = (x[:, :, :keys].swapaxes(1, 2) for x in accumulator)
        return sums[1], dq, dk, dv

    def _backward(self, problem, score, q, block, rows, query_fields):
        """(sums over the pairs of this device, (dk, dv) of its keys)."""
        first, *hops = self._hops
        block = self._hop(block, first)

        def gradients(block, sums):
            k, v, key_fields = block
            sums, dk, dv = problem.backward(score, q, k, v, *rows, query_fields, key_fields, sums)
            return sums, (dk, dv)

        def step(hops: tuple[int, int], carry):
            (last, next_), (block, accumulator, sums) = hops, carry
            arriving, moved = self._hop(block, next_), self._hop(accumulator, last)
            sums, share = gradients(block, sums)
            return arriving, jax.tree.map(jnp.add, moved, share), sums

        arriving = self._hop(block, hops[0]) if hops else block
        sums, accumulator = gradients(block, problem.empty_sums(score, q))
        if hops:
            carry = arriving, accumulator, sums
            block, accumulator, sums = _in_runs(step, list(itertools.pairwise(hops)), carry)
            moved = self._hop(accumulator, hops[-1])
            sums, share = gradients(block, sums)
            accumulator = jax.tree.map(jnp.add, moved, share)
        return sums, self._hop(accumulator, -first - sum(hops))

    def _rounds(self, q, k) -> int:
        (_, length, heads, _), (_, keys, kv_heads, _) = q.shape, k.shape
        if self.rounds is None:
            return rounds_that_pay(heads, kv_heads, length, keys)
        if self.rounds < 1 or kv_heads % self.rounds:
            raise UserError(
                f"Ring was asked to go around {self.rounds} times with a share of the heads each, and {kv_heads} "
                "key/value heads do not divide: rounds is one of their divisors."
            )
        return self.rounds

    @property
    def _farthest(self) -> int:
        return self.shards - 1 if self.offsets is None else max(self.offsets, default=0)

    @property
    def _span(self) -> tuple[str, int, int]:
        """What a pass around the ring as one program has to know of it."""
        return self.axis, self.shards, self._farthest

    @property
    def _hops(self) -> list[int]:
        """From the own block to the first offset, and from each offset to the next."""
        offsets = range(self.shards) if self.offsets is None else self.offsets or (0,)
        return [b - a for a, b in itertools.pairwise((0, *offsets))]

    def _key_block(self, problem, k, v, key_fields):
        k, v = (problem.keys_or_values(x) for x in (k, v))
        return k, v, key_fields

    def _hop(self, tree, distance: int):
        if distance % self.shards == 0:
            return tree
        ring = [(i, (i + distance) % self.shards) for i in range(self.shards)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, ring), tree)

    def _missed(self, mask, query_fields, key_fields):
        """Whether this device has work at an offset that is not visited."""
        visited = range(self.shards) if self.offsets is None else self.offsets
        left_out = np.setdiff1d(np.arange(self.shards), visited)
        if not left_out.size:
            return False
        query, key = mask.query_summaries(_runs(query_fields)), mask.key_summaries(_runs(key_fields))
        query = jax.tree.map(lambda x: x[None], query)
        born = (jax.lax.axis_index(self.axis) - left_out) % self.shards
        key = jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis)[born], key)
        return (_verdicts(mask, query, key) != NONE).any()


def rounds_that_pay(heads: int, kv_heads: int, length: int, keys: int) -> int:
    """How often to go around a ring with a share of the heads each, for shards of `length` queries and `keys` keys."""
    divisors = (n for n in range(kv_heads, 0, -1) if kv_heads % n == 0)
    return next((n for n in divisors if heads // n * length * keys >= LOGITS), 1)


def live_offsets(mask: Mask, q_tokens: Tokens, k_tokens: Tokens, shards: int) -> tuple[int, ...]:
    """The offsets of a ring at which some device has work: device i with the keys of device (i - offset) mod shards.

    Found from summaries of runs of the tokens, hence never too few. Contiguous order and a window of w need
    1 + ceil((w - 1) / tokens of a shard).

    Args:
      q_tokens, k_tokens: concrete, in the order of the layout; their lengths are multiples of `shards`.
    """
    q_tokens, k_tokens = (jax.tree.map(np.asarray, x) for x in (q_tokens, k_tokens))

    def of_shards(tokens):
        # Shards first: (shards, B, tokens of a shard).
        return {n: x.reshape(x.shape[0], shards, -1).swapaxes(0, 1) for n, x in tokens.fields().items()}

    query, key = (
        mask.query_summaries(_runs(of_shards(q_tokens.as_queries()))),
        mask.key_summaries(_runs(of_shards(k_tokens))),
    )
    return tuple(
        offset
        for offset in range(shards)
        if (_verdicts(mask, query, jax.tree.map(lambda x: np.roll(x, offset, axis=0), key)) != NONE).any()  # noqa: B023
    )


def _runs(fields):
    """Every field in RUNS runs: (..., T) to (..., RUNS, tokens of a run), the last ones repeated to fill them."""

    def cut(x):
        size = -(-x.shape[-1] // RUNS)
        padding = [(0, 0)] * (x.ndim - 1) + [(0, size * RUNS - x.shape[-1])]
        xp = jnp if isinstance(x, jax.Array) else np
        return xp.pad(x, padding, mode="edge").reshape(*x.shape[:-1], RUNS, size)

    return {name: cut(x) for name, x in fields.items()}


def _verdicts(mask, query, key):
    query = jax.tree.map(lambda x: x[..., :, None], query)
    return mask.verdict(query, jax.tree.map(lambda x: x[..., None, :], key))


def _in_rounds(rounds: int, attend, score, arrays):
    """attend(score, *arrays), one share of the heads after the other, so that memory holds the work of one.

    Heads are the first axis of a parameter of a score, and the third of arrays. `attend` gives (gradients of the score
    or nothing, arrays).
    """
    if rounds == 1:
        return attend(score, *arrays)

    def share(x, index, axis: int):
        size = x.shape[axis] // rounds
        return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)

    def attend_share(index):
        own = jax.tree.map(lambda x: share(x, index, 0) if x.ndim else x, score)
        return attend(own, *(share(x, index, 2) for x in arrays))

    def put(whole, part, index, axis: int):
        return jax.lax.dynamic_update_slice_in_dim(whole, part, index * part.shape[axis], axis)

    def round_(index, carry):
        (d_score, results), (of_score, parts) = carry, attend_share(index)
        d_score = jax.tree.map(lambda x, part: put(x, part, index, 0) if x.ndim else x + part, d_score, of_score)
        return d_score, jax.tree.map(lambda x, part: put(x, part, index, 2), results, parts)

    def empty(part, axis: int):
        shape = [n * rounds if i == axis else n for i, n in enumerate(part.shape)]
        return zeros(tuple(shape), arrays[0]).astype(part.dtype)

    of_score, parts = jax.eval_shape(attend_share, 0)
    carry = jax.tree.map(lambda x: empty(x, 0), of_score), jax.tree.map(lambda x: empty(x, 2), parts)
    return jax.lax.fori_loop(0, rounds, round_, carry)


def _in_runs(step, hops: list, carry):
    """step(hop, carry) for every hop; equal hops in a row are one loop, so that a long ring compiles as soon."""
    for hop, run in itertools.groupby(hops):
        carry = jax.lax.fori_loop(0, len([*run]), lambda _, carry: step(hop, carry), carry)  # noqa: B023
    return carry
