"""CoPE, contextual positions: a key is as far away as gates have opened since (Golovneva et al. 2024, section 4).

A query i looks back over the keys that it sees, in the order of their positions. With a table of P vectors e_n,

    g_ij = sigmoid(scale q_i . k_j)                 whether j counts for i
    p_ij = min(sum of g_il over l >= j, P - 1)      the position of j, a fraction; that of the latest key is g_ii
    b_ij = (1 - w) q_i . e_floor(p) + w q_i . e_ceil(p),  w = p - floor(p)
    out_i = softmax over j of scale (q_i . k_j + b_ij), times v_j

In tiles: for a block of queries, over the blocks of keys from the latest to the earliest, a row carries n, the gates so
far, beside the m, l, acc of the online softmax (lib/blockwise.py); in a tile p = n + the gates summed from the right.
Where every row that sees a tile has n >= P - 1, b is q_i . e_(P-1) in all of it, and nothing is counted any more.

The gradient is that of the scan, with tiles computed again: db/dp = q . (e_ceil - e_floor), 0 where p is clamped, and
dg_ij = sum of dp_il over l <= j, which the scan sums the other way round. A block of queries keeps its inputs alone,
and, only while it is differentiated, m, l, acc, n of its tiles. Memory is O(length).

The count runs over keys in the order in which they lie. In a striped or zigzag layout that is not the order of their
positions, so these layouts are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from striate.lib import masks
from striate.lib.attention import check_arrays, check_tokens
from striate.lib.errors import UserError
from striate.lib.tiles import LOWEST
from striate.lib.tokens import PADDING, Tokens


def cope(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKV: jax.Array,
    table_PD: jax.Array,
    *,
    mask: masks.Mask | None = None,
    q_tokens: Tokens | None = None,
    k_tokens: Tokens | None = None,
    gate_k_BSKD: jax.Array | None = None,
    scale: float | None = None,
    tile: tuple[int, int] = (128, 128),
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention with contextual positions, causal and within documents.

    Args:
      q_BTHD: queries, (batch, length, heads, head_dim), a floating dtype.
      k_BSKD: keys, (batch, key length, key/value heads, head_dim), shared by groups of heads as in `attention`.
      v_BSKV: values, (batch, key length, key/value heads, value width).
      table_PD: float32 (P, head_dim), the vectors of the positions 0 to P - 1, shared by all heads. They stand beside
        keys, under the scale; multiply them by 1 / scale for a bias outside of it.
      mask: a formula that hides further pairs, besides causal() & same("document"); hidden keys are not counted.
      q_tokens: Tokens of the queries, in any order; None is Tokens.arange, where length == key length.
      k_tokens: Tokens of the keys; the keys of a document lie in the order of their positions. None is q_tokens, where
        length == key length.
      gate_k_BSKD: keys of the gates alone; None is k_BSKD.
      scale: None is head_dim ** -0.5.
      tile: lengths of a block of queries and of keys.
      implementation: "xla" or "reference"; None is "xla".

    Returns:
      (batch, length, heads, value width) in the dtype of v. Logits, counts and accumulators are float32. A row that
      sees nothing gives 0 and zero gradient. Where Tokens are not known before compiling and a row of the batch has
      keys out of order, that row is NaN.

    Raises:
      UserError: shapes, dtypes or Tokens that do not fit together; keys that lie out of order; a mask per head.
      NotImplementedError: an implementation that there is not.
    """
    gate_k_BSKD = k_BSKD if gate_k_BSKD is None else gate_k_BSKD
    mask = masks.causal() & masks.same("document") & (masks.everything() if mask is None else mask)
    check_arrays(q_BTHD, k_BSKD, v_BSKV)
    q_tokens, k_tokens = check_tokens(q_BTHD, k_BSKD, q_tokens, k_tokens)
    _check(k_BSKD, table_PD, gate_k_BSKD, mask, tile, implementation)
    mask.check(q_tokens, k_tokens)
    ordered_B = _in_order(k_tokens)
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else float(scale)
    batch, length, heads, width = q_BTHD.shape
    q_BKGTD = jnp.moveaxis(q_BTHD.reshape(batch, length, k_BSKD.shape[2], -1, width), 1, 3)
    z_BKGTP = jnp.einsum("bkgtd,pd->bkgtp", q_BKGTD, table_PD, preferred_element_type=jnp.float32)
    queries = Queries(q_tokens.as_queries().fields(), q_BKGTD, z_BKGTP)
    keys = Keys(k_tokens.fields(), *(x.swapaxes(1, 2) for x in (k_BSKD, gate_k_BSKD, v_BSKV)))
    if implementation == "reference":
        out_BKGTV = reference(mask, scale, queries, keys)
    else:
        out_BKGTV = _tiled(mask, scale, queries, keys, tile)
    out_BTHV = jnp.moveaxis(out_BKGTV, 3, 1).reshape(batch, length, heads, -1).astype(v_BSKV.dtype)
    return out_BTHV if ordered_B is None else jnp.where(ordered_B[:, None, None, None], out_BTHV, jnp.nan)


class Queries(NamedTuple):
    """Heads-major, the G query heads of a key/value head together."""

    fields: Mapping[str, jax.Array]  # (B, T)
    q: jax.Array  # (B, K, G, T, D)
    z: jax.Array  # (B, K, G, T, P) float32, q_i . e_n


class Keys(NamedTuple):
    """Heads-major."""

    fields: Mapping[str, jax.Array]  # (B, S)
    k: jax.Array  # (B, K, S, D)
    gate_k: jax.Array  # (B, K, S, D)
    v: jax.Array  # (B, K, S, V)


class Carry(NamedTuple):
    """What a row brings along from the later keys. float32."""

    maximum: jax.Array  # (B, K, G, T) m, greatest logit so far
    total: jax.Array  # (B, K, G, T) l, sum of exp(logit - m)
    weighted: jax.Array  # (B, K, G, T, V) acc, sum of exp(logit - m) v
    count: jax.Array  # (B, K, G, T) n, gates so far


def reference(mask: masks.Mask, scale: float, queries: Queries, keys: Keys) -> jax.Array:
    """The dense form, (B, K, G, T, V): quadratic memory, one line an equation."""
    visible = _visible(mask, queries, keys)
    gates = jnp.where(visible, jax.nn.sigmoid(scale * _product(queries.q, keys.gate_k)), 0.0)
    position = jnp.minimum(jax.lax.cumsum(gates, axis=4, reverse=True), queries.z.shape[-1] - 1.0)
    logits = scale * (_product(queries.q, keys.k) + _interpolate(queries.z, position))
    top = jax.lax.stop_gradient(jnp.where(visible, logits, LOWEST).max(-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, logits, LOWEST) - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bkgts,bksv->bkgtv", weights / jnp.where(total > 0, total, 1.0), keys.v)


def _tiled(mask: masks.Mask, scale: float, queries: Queries, keys: Keys, tile: tuple[int, int]) -> jax.Array:
    """(B, K, G, T, V) float32: the scan of the head of this file."""
    shape, width = queries.q.shape[:4], keys.v.shape[-1]
    query_blocks, key_blocks = _blocks(queries, tile[0], PADDING - 1), _blocks(keys, tile[1], PADDING)

    @jax.checkpoint
    def rows(queries: Queries):
        @jax.checkpoint
        def step(carry: Carry, keys: Keys):
            visible = _visible(mask, queries, keys)
            add = functools.partial(_add, scale, visible, queries, keys)
            return jax.lax.cond(visible.any(), add, lambda carry: carry, carry), None

        zeros = jnp.zeros(queries.q.shape[:4], jnp.float32)
        start = Carry(zeros + LOWEST, zeros, jnp.zeros((*zeros.shape, width), jnp.float32), zeros)
        end, _ = jax.lax.scan(step, start, key_blocks, reverse=True)
        return end.weighted / jnp.where(end.total > 0, end.total, 1.0)[..., None]

    out = jnp.moveaxis(jax.lax.map(rows, query_blocks), 0, 3)
    return out.reshape(*shape[:3], -1, width)[:, :, :, : shape[3]]


def _add(scale: float, visible: jax.Array, queries: Queries, keys: Keys, carry: Carry) -> Carry:
    """The carry after one more tile; `visible` (B, 1, 1, T, S)."""
    last = queries.z.shape[-1] - 1.0

    def near():
        gates = jnp.where(visible, jax.nn.sigmoid(scale * _product(queries.q, keys.gate_k)), 0.0)
        position = carry.count[..., None] + jax.lax.cumsum(gates, axis=4, reverse=True)
        return _interpolate(queries.z, jnp.minimum(position, last)), carry.count + gates.sum(-1)

    def far():
        return jnp.broadcast_to(queries.z[..., -1:], (*carry.count.shape, keys.k.shape[2])), carry.count

    done = (carry.count >= last) | ~visible.any(-1)
    bias, count = jax.lax.cond(done.all(), far, near)
    logits = jnp.where(visible, scale * (_product(queries.q, keys.k) + bias), -jnp.inf)
    # A constant to the gradient: out does not depend on what is subtracted.
    maximum = jax.lax.stop_gradient(jnp.maximum(carry.maximum, logits.max(-1)))
    weights, decay = jnp.exp(logits - maximum[..., None]), jnp.exp(carry.maximum - maximum)
    new = jnp.einsum("bkgts,bksv->bkgtv", weights.astype(keys.v.dtype), keys.v, preferred_element_type=jnp.float32)
    total, weighted = carry.total * decay + weights.sum(-1), carry.weighted * decay[..., None] + new
    return Carry(maximum, total, weighted, count)


def _interpolate(z_BKGTP: jax.Array, position_BKGTS: jax.Array) -> jax.Array:
    """z at fractional positions, linear between the whole ones."""
    floor, ceil = jnp.floor(position_BKGTS), jnp.ceil(position_BKGTS)
    low, high = (jnp.take_along_axis(z_BKGTP, x.astype(jnp.int32), axis=-1, mode="clip") for x in (floor, ceil))
    return low + (position_BKGTS - floor) * (high - low)


def _product(q_BKGTD: jax.Array, k_BKSD: jax.Array) -> jax.Array:
    return jnp.einsum("bkgtd,bksd->bkgts", q_BKGTD, k_BKSD, preferred_element_type=jnp.float32)


def _visible(mask: masks.Mask, queries: Queries, keys: Keys) -> jax.Array:
    """bool (B, 1, 1, T, S)"""
    query = {name: x[:, None, None, :, None] for name, x in queries.fields.items()}
    key = {name: x[:, None, None, None, :] for name, x in keys.fields.items()}
    return mask.tile(query, key)


def _blocks(tree, length: int, hidden: int):
    """Tokens cut into blocks, in a new first axis: (blocks, ..., length, ...); padding has the document `hidden`."""

    def cut(path, x):
        axis = 1 if x.ndim == 2 else x.ndim - 2
        filler = hidden if path[-1] == jax.tree_util.DictKey("document") else 0
        padding = [(0, -x.shape[axis] % length if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, padding, constant_values=filler)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, length, *x.shape[axis + 1 :]), axis, 0)

    return jax.tree_util.tree_map_with_path(cut, tree)


def _check(k, table, gate_k, mask, tile, implementation) -> None:
    if table.ndim != 2 or table.shape[1] != k.shape[3]:
        raise UserError(
            f"The table of CoPE has shape {table.shape}; it needs (positions, head_dim) with head_dim {k.shape[3]}."
        )
    if (gate_k.shape, gate_k.dtype) != (k.shape, k.dtype):
        raise UserError(
            f"gate_k has shape {gate_k.shape} and dtype {gate_k.dtype}; it needs those of k, {k.shape} and {k.dtype}."
        )
    if mask.heads is not None:
        raise UserError(f"The mask {mask} differs from head to head; CoPE needs one for all: call it for each.")
    if min(tile) < 1:
        raise UserError(f"tile is {tile}; its lengths are at least 1.")
    if implementation not in (None, "xla", "reference"):
        raise NotImplementedError(f"CoPE has no {implementation!r} form: use implementation=None or 'reference'.")


def _in_order(tokens: Tokens) -> jax.Array | None:
    """None where the keys are known to lie in order; where they are not known, bool (B,).

    Raises:
      UserError: they are known, and do not.
    """
    known = not any(isinstance(x, jax.core.Tracer) for x in (tokens.position, tokens.document))
    xp = np if known else jnp
    order_BS = xp.argsort(tokens.document, axis=1, stable=True)
    document, position = (xp.take_along_axis(x, order_BS, axis=1) for x in (tokens.document, tokens.position))
    follows = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] != PADDING)
    wrong = follows & (position[:, 1:] <= position[:, :-1])
    if not known:
        return ~wrong.any(1)
    for row, at in np.argwhere(wrong)[:1]:
        raise UserError(
            "CoPE counts gates from one key to the next, so the keys of a document have to lie in the order of their "
            f"positions; in row {row}, document {document[row, at]}, position {position[row, at + 1]} comes after "
            f"{position[row, at]}: put them in natural order (layout.restore), or choose positions that any order "
            "suits, such as rope."
        )
    return None
