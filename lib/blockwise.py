"""Exact attention in tiles: the XLA form, O(length) memory, any device.

Forward, for one block of queries, over its live blocks of keys (online softmax; Milakov and Gimelshein 2018, Dao 2023):

    S = scale Q K^T        m' = max(m, rowmax S)      P = exp(S - m')
    l' = l e^(m - m') + rowsum P                      acc' = acc e^(m - m') + P V
    at the end                                        out = acc / l,  lse = m + log l

Backward, for one block of keys, over its live blocks of queries; only q, k, v, out, lse were saved. With
delta = rowsum(dO * out) - dlse, everything is computed transposed, so that each of the five products is a plain one:

    P^T = exp(scale K Q^T - lse)                      dV += P^T dO
    dS^T = P^T * (V dO^T - delta)                     dK += scale dS^T Q       dQ^T += scale K^T dS^T

With a score (striate.lib.scores) t = logit(S) takes the place of S in the exponentials, and weights w multiply P where
it meets V, but not in l. Then dV += (w P)^T dO, and jax.vjp of the score's tile turns dt = P * (w (V dO^T) - delta) and
dw = P * (V dO^T) into dS and the gradients of its parameters; delta is rowsum(dO * out) - dlse for any w. Where weights
are not normalised P is exp(t): lse counts as 0, and delta is -dlse exp(-lse).

A block is live unless its verdict is NONE. The blocks of verdict ALL run without mask arithmetic, before the MIXED
ones. Verdicts are computed from the Tokens inside the program, so traced Tokens skip as well as known ones.

Arrays are heads-major (lib/tiles.py): the G query heads of a group are further rows of one product, so keys are never
repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from striate.lib import masks
from striate.lib.scores import Score
from striate.lib.tiles import Partial, Tiled, block_length, zeros

# On CPU products reach their rate from 128 x 128 on. A long sequence gains from larger tiles, the larger the
# fewer heads there are (seen with 1, 4 and 8 of 64), but a band (a window, packed documents) and a short sequence (the
# shards of a ring) gain more from having blocks to skip. How many logits a tile of all heads has at most, and how many
# blocks a sequence has at least where SMALLEST_TILE allows. benchmarks/attention.py tiles, band-tiles: 8 heads.
SMALLEST_TILE = 128
WIDE, BAND = (2**20, 8), (2**18, 16)


class Live(NamedTuple):
    """For every block on one side, the blocks on the other side that have work, compacted."""

    order: jax.Array  # (B, n, m) indices of the other side: the ALL blocks, then the MIXED ones, then the rest
    full: jax.Array  # (B, n) how many are ALL
    live: jax.Array  # (B, n) how many are ALL or MIXED
    rows: jax.Array  # (B n) indices of (B, n), flattened: those that have work, then the rest
    working: jax.Array  # () how many have work


def live_blocks(problem: Tiled, query_fields: Mapping, key_fields: Mapping) -> tuple[Live, Live]:
    """(for each query block its key blocks, for each key block its query blocks). Fields are (B, T) and (B, S)."""

    def compact(verdict):
        order = jnp.argsort(-verdict, axis=-1, stable=True).astype(jnp.int32)
        full, live = (verdict == masks.ALL).sum(-1), (verdict != masks.NONE).sum(-1)
        idle = (live == 0).reshape(-1)
        return Live(order, full, live, jnp.argsort(idle, stable=True).astype(jnp.int32), (~idle).sum())

    verdict = problem.verdicts(query_fields, key_fields)
    return compact(verdict), compact(verdict.swapaxes(1, 2))


def forward(problem: Tiled, score: Score, q, k, v, query_fields, key_fields, partial: Partial) -> Partial:
    """Adds the keys k, v to `partial`. Lengths are multiples of the tile."""
    (_, heads, group, length, width), (q_tile, k_tile) = q.shape, problem.tile
    blocks, _ = live_blocks(problem, query_fields, key_fields)
    # Scaled queries save a pass over every tile; narrow ones would lose bits.
    before, after = (problem.scale, 1.0) if q.dtype == jnp.float32 else (1.0, problem.scale)

    def query_block(index, partial: Partial) -> Partial:
        b, start = blocks.rows[index] // (length // q_tile), blocks.rows[index] % (length // q_tile) * q_tile
        q_KRD = before * _block(q, b, start, q_tile, axis=2).reshape(heads, group * q_tile, width)
        query = _block_fields(query_fields, b, start, q_tile, (1, 1, -1, 1))

        def key_block(index, carry: Partial, masked: bool) -> Partial:
            k_start = blocks.order[b, start // q_tile, index] * k_tile
            s_KRS = after * _product(q_KRD, _block(k, b, k_start, k_tile, axis=1), "krd,ksd->krs")
            key = _block_fields(key_fields, b, k_start, k_tile, (1, 1, 1, -1))
            t_KGQS, weight = _scored(score, s_KRS.reshape(heads, group, q_tile, k_tile), query, key, group_axis=1)
            if masked:
                t_KGQS = jnp.where(_visible(problem.mask, query, key), t_KGQS, -jnp.inf)
            t_KRS = t_KGQS.reshape(s_KRS.shape)
            maximum = jnp.maximum(carry.maximum, t_KRS.max(-1))
            p_KRS = jnp.exp(t_KRS - maximum[..., None])
            decay = jnp.exp(carry.maximum - maximum)
            total = carry.total * decay + p_KRS.sum(-1)
            p_KRS = _weighted(p_KRS, weight).astype(v.dtype)
            weighted = _product(p_KRS, _block(v, b, k_start, k_tile, axis=1), "krs,ksv->krv")
            return Partial(maximum, total, carry.weighted * decay[..., None] + weighted)

        def rows(x):
            return _block(x, b, start, q_tile, axis=2).reshape(heads, group * q_tile, *x.shape[4:])

        def put(x, block):
            block = block.reshape(1, heads, group, q_tile, *x.shape[4:])
            return jax.lax.dynamic_update_slice(x, block, (b, 0, 0, start) + (0,) * (x.ndim - 4))

        full, live = blocks.full[b, start // q_tile], blocks.live[b, start // q_tile]
        carry = jax.tree.map(rows, partial)
        carry = jax.lax.fori_loop(0, full, lambda i, c: key_block(i, c, masked=False), carry)
        carry = jax.lax.fori_loop(full, live, lambda i, c: key_block(i, c, masked=True), carry)
        return Partial(*map(put, partial, carry))

    return jax.lax.fori_loop(0, blocks.working, query_block, partial)


def empty_sums(problem: Tiled, score: Score, q: jax.Array) -> tuple[jax.Array, Score]:
    """What `backward` adds to: the gradients of the scaled queries and of the score, float32.

    The first is transposed in blocks, (B, blocks, K, D, G q_tile).
    """
    (batch, heads, group, length, width), q_tile = q.shape, problem.tile[0]
    dq_T = zeros((batch, length // q_tile, heads, width, group * q_tile), q)
    return dq_T, jax.tree.map(lambda x: zeros(x.shape, q), score)


def finish_dq(problem: Tiled, dq_T: jax.Array, q: jax.Array) -> jax.Array:
    """The gradient of the queries, heads-major like q. The scale enters here, where nothing is rounded any more."""
    (batch, heads, group, length, width), q_tile = q.shape, problem.tile[0]
    dq = dq_T.reshape(batch, length // q_tile, heads, width, group, q_tile).transpose(0, 2, 4, 1, 5, 3)
    return problem.scale * dq.reshape(q.shape)


def backward(problem: Tiled, score: Score, q, k, v, d_out, lse, delta, query_fields, key_fields, sums):
    """(sums plus what the pairs (q, k) give, dk, dv), all float32; dk and dv like k and v.

    sums is (dq_T as in `empty_sums`, the gradients of the score). d_out is (B, K, G, T, V); lse and delta are
    (B, K, G, T). Lengths are multiples of the tile.
    """
    (_, heads, group, *_), (q_tile, k_tile) = q.shape, problem.tile
    keys, rows = k.shape[2], group * q_tile
    _, blocks = live_blocks(problem, query_fields, key_fields)
    # A row that sees nothing has lse = -inf; its logits are all -inf, and exp(-inf - 0) = 0 is what is meant.
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)

    def key_block(index, carry):
        sums, dk, dv = carry
        b, start = blocks.rows[index] // (keys // k_tile), blocks.rows[index] % (keys // k_tile) * k_tile
        k_KSD, v_KSV = _block(k, b, start, k_tile, axis=1), _block(v, b, start, k_tile, axis=1)
        k_KDS = k_KSD.swapaxes(1, 2)
        key = _block_fields(key_fields, b, start, k_tile, (1, -1, 1, 1))

        def query_block(index, carry, masked: bool):
            (dq_T, d_score), dk_KSD, dv_KSV = carry
            i = blocks.order[b, start // k_tile, index]

            def tile(x):
                return _block(x, b, i * q_tile, q_tile, axis=2).reshape(heads, rows, *x.shape[4:])

            q_KRD, d_out_KRV = tile(q), tile(d_out)
            lse_KR, delta_KR = _materialise((tile(lse), tile(delta)))
            s_KSR = problem.scale * _product(k_KSD, q_KRD, "ksd,krd->ksr")
            query = _block_fields(query_fields, b, i * q_tile, q_tile, (1, 1, 1, -1))

            def scored(s_KSR, score):
                s_KSGQ = s_KSR.reshape(heads, k_tile, group, q_tile)
                return _scored(score, s_KSGQ, query, key, group_axis=2)

            (t_KSGQ, weight), pull = jax.vjp(scored, s_KSR, score)
            if masked:
                t_KSGQ = jnp.where(_visible(problem.mask, query, key), t_KSGQ, -jnp.inf)
            p_KSR = jnp.exp(t_KSGQ.reshape(s_KSR.shape) - lse_KR[:, None])
            dp_KSR = _product(v_KSV, d_out_KRV, "ksv,krv->ksr")
            dt_KSR = p_KSR * (_weighted(dp_KSR, weight) - delta_KR[:, None])
            d_weight = None if weight is None else (p_KSR * dp_KSR).reshape(weight.shape)
            ds_KSR, share = pull((dt_KSR.reshape(t_KSGQ.shape), d_weight))
            d_score, ds_KSR = jax.tree.map(jnp.add, d_score, share), ds_KSR.astype(q.dtype)
            dv_KSV += _product(_weighted(p_KSR, weight).astype(v.dtype), d_out_KRV, "ksr,krv->ksv")
            dk_KSD += _product(ds_KSR, q_KRD, "ksr,krd->ksd")
            at = (b, i, 0, 0, 0)
            dq_block = jax.lax.dynamic_slice(dq_T, at, (1, 1, *dq_T.shape[2:]))
            dq_block += _product(k_KDS, ds_KSR, "kds,ksr->kdr")[None, None]
            return (jax.lax.dynamic_update_slice(dq_T, dq_block, at), d_score), dk_KSD, dv_KSV

        full, live = blocks.full[b, start // k_tile], blocks.live[b, start // k_tile]
        nothing = zeros(k_KSD.shape, q), zeros(v_KSV.shape, q)
        inner = jax.lax.fori_loop(0, full, lambda j, c: query_block(j, c, masked=False), (sums, *nothing))
        sums, dk_KSD, dv_KSV = jax.lax.fori_loop(full, live, lambda j, c: query_block(j, c, masked=True), inner)
        dk = jax.lax.dynamic_update_slice(dk, (problem.scale * dk_KSD)[None], (b, 0, start, 0))
        return sums, dk, jax.lax.dynamic_update_slice(dv, dv_KSV[None], (b, 0, start, 0))

    nothing = zeros(k.shape, q), zeros(v.shape, q)
    return jax.lax.fori_loop(0, blocks.working, key_block, (sums, *nothing))


def _product(a, b, subscripts: str):
    def product(a, b):
        return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)

    if a.dtype == jnp.float32:
        return product(a, b)
    # XLA on CPU has no product of some shapes whose result is wider than its operands.
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: product(a.astype(jnp.float32), b.astype(jnp.float32)), default=product
    )


def _block(x, b, start, length: int, axis: int):
    """x[b], cut to `length` entries from `start` on the given axis of the result."""
    starts, sizes = [0] * x.ndim, list(x.shape)
    starts[0], sizes[0], starts[axis + 1], sizes[axis + 1] = b, 1, start, length
    return jax.lax.dynamic_slice(x, starts, sizes)[0]


def _block_fields(fields: Mapping, b, start, length: int, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """The fields of one block, in a shape that broadcasts with the logits of a tile."""
    return _materialise({name: _block(x, b, start, length, axis=0).reshape(shape) for name, x in fields.items()})


def _scored(score: Score, s, query: Mapping, key: Mapping, group_axis: int):
    """The score's (t, w) of a tile whose heads lie on axis 0 and on the axis of the group; w is None for 1."""
    axes = [s.shape[axis] if axis in (0, group_axis) else 1 for axis in range(s.ndim)]
    shaped = jax.tree.map(lambda x: x.reshape(*axes, *x.shape[1:]) if x.ndim else x, score)
    t, weight = shaped.tile(s, query, key)
    return t, None if weight is None else jnp.broadcast_to(weight, s.shape)


def _weighted(p, weight):
    return p if weight is None else (p.reshape(weight.shape) * weight).reshape(p.shape)


def _visible(mask: masks.Mask, query: Mapping, key: Mapping) -> jax.Array:
    """The booleans of one tile, which broadcast with its logits; the axes of the heads are 1."""
    shape = jnp.broadcast_shapes(query["position"].shape, key["position"].shape)
    return _materialise(jnp.broadcast_to(mask.tile(query, key), shape))


def _materialise(tree):
    # Small arrays that every element of a tile reads. XLA would fuse how they are cut out of larger ones into the
    # loop over the tile, and compute that for each of its elements.
    return jax.lax.optimization_barrier(tree)


class Blockwise(Tiled):
    """The form of this file."""

    @classmethod
    def choose_tile(cls, mask, q_BTHD, k_BSKD):
        (_, length, heads, _), keys = q_BTHD.shape, k_BSKD.shape[1]
        logits, blocks = BAND if mask.is_band else WIDE
        # Square, or twice as many keys as queries.
        area = max(logits // heads, 1).bit_length() - 1
        largest = 2 ** (area // 2), 2 ** (area - area // 2)

        def block(length: int, most: int) -> int:
            longest = max(min(length // blocks, most), SMALLEST_TILE)
            return length if length <= longest else block_length(length, longest, 8)

        return block(length, largest[0]), block(keys, largest[1])

    forward, empty_sums, backward, finish_dq = forward, empty_sums, backward, finish_dq
