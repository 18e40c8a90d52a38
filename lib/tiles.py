"""Tiles: what every form of exact attention on one device shares, from plain XLA to the kernels.

Attention is cut into blocks of queries and blocks of keys. A `Tiled` knows mask, scale and block lengths, which do not
change from one tile, or one step of a ring, to the next; a `Partial` is what has been attended to so far.

Arrays are heads-major here: q (B, K, G, T, D), k (B, K, S, D), v (B, K, S, V) with H = K G query heads, G of them for
each key/value head, and lengths padded to whole blocks. The mask hides the padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from striate.lib import masks
from striate.lib.scores import Score

# The running maximum starts finite, so that a row that has seen nothing yet needs no guard against inf - inf.
LOWEST = -1e30


class Partial(NamedTuple):
    """Attention over the keys seen so far, unnormalised: what travels between tiles and between ring steps. float32.

    Logits are in units of `Tiled.unit`, and exp of that base: a maximum that changed its unit on the way would be
    rounded, and l and acc would no longer be those of it.
    """

    maximum: jax.Array  # (B, K, G, T) m, greatest logit so far
    total: jax.Array  # (B, K, G, T) l, sum of exp(logit - m)
    weighted: jax.Array  # (B, K, G, T, V) acc, sum of exp(logit - m) v

    @classmethod
    def empty(cls, q_BKGTD: jax.Array, value_width: int) -> Partial:
        none = zeros(q_BKGTD.shape[:-1], q_BKGTD)
        return cls(none + LOWEST, none, zeros((*none.shape, value_width), q_BKGTD))

    def finish(self, unit: float, normalised: bool) -> tuple[jax.Array, jax.Array]:
        """(out float32 (B, K, G, T, V), lse (B, K, G, T)); a row that saw nothing gives 0 and -inf."""
        seen = self.total > 0
        total, maximum = jnp.where(seen, self.total, 1.0), unit * self.maximum
        lse = jnp.where(seen, maximum + jnp.log(total), -jnp.inf)
        if normalised:
            return self.weighted / total[..., None], lse
        return self.weighted * jnp.where(seen, jnp.exp(maximum), 0.0)[..., None], lse


INSIDE = "_inside"


@dataclass(frozen=True)
class Tiled:
    """Attention on one device under a mask, in tiles. Immutable, so that it can be static.

    Attributes:
      mask: where padding is needed, it hides that too.
      scale: factor of the logits.
      tile: lengths of a block of queries and of a block of keys.
      fused: whether it has `ring_forward` and `ring_backward`, passes around a ring as one program.
      unit: of the logits in a Partial: 1, or ln 2 where weights are powers of two.
    """

    fused: ClassVar[bool] = False
    unit: ClassVar[float] = 1.0

    mask: masks.Mask
    scale: float
    tile: tuple[int, int]

    @classmethod
    def plan(cls, mask: masks.Mask, scale: float, q_BTHD: jax.Array, k_BSKD: jax.Array) -> Tiled:
        """With the tile that suits arrays of these shapes."""
        tile = cls.choose_tile(mask, q_BTHD, k_BSKD)
        if q_BTHD.shape[1] % tile[0] or k_BSKD.shape[1] % tile[1]:
            mask = mask & masks.query(INSIDE, 1, 1) & masks.key(INSIDE, 1, 1)
        return cls(mask, scale, tile)

    @classmethod
    def plan_attend(cls, mask: masks.Mask, scale: float, q_BTHD: jax.Array, k_BSKD: jax.Array) -> Tiled:
        """For `attend` alone: another form may suit the forward pass of few queries."""
        return cls.plan(mask, scale, q_BTHD, k_BSKD)

    @classmethod
    def choose_tile(cls, mask: masks.Mask, q_BTHD: jax.Array, k_BSKD: jax.Array) -> tuple[int, int]:
        raise NotImplementedError

    def queries(self, score: Score, q_BTHD: jax.Array, kv_heads: int) -> jax.Array:
        """(B, T, H, D) to what the passes under that score take as q, heads-major (B, K, G, padded T, D)."""
        return self.rows(q_BTHD, kv_heads)

    def rows(self, x_BTHD: jax.Array, kv_heads: int) -> jax.Array:
        """(B, T, H, ...) to heads-major (B, K, G, padded T, ...)."""
        batch, length, heads = x_BTHD.shape[:3]
        x = jnp.moveaxis(x_BTHD.reshape(batch, length, kv_heads, heads // kv_heads, *x_BTHD.shape[3:]), 1, 3)
        return _pad(x, self.tile[0], axis=3)

    def keys_or_values(self, x_BSKD: jax.Array) -> jax.Array:
        """(B, S, K, D) to heads-major (B, K, padded S, D)."""
        return _pad(x_BSKD.swapaxes(1, 2), self.tile[1], axis=2)

    def sides(self, score: Score, q_tokens: Mapping, k_tokens: Mapping) -> tuple[dict, dict]:
        """The fields of queries (B, padded T) and of keys (B, padded S) that mask and score read."""
        return self._side(score, q_tokens, 0), self._side(score, k_tokens, 1)

    def verdicts(self, query_fields: Mapping, key_fields: Mapping) -> jax.Array:
        """NONE, MIXED or ALL, int8 (B, query blocks, key blocks), from fields as in `sides`."""

        def blocks(tokens, tile):
            return {name: x.reshape(x.shape[0], -1, tile) for name, x in tokens.items()}

        query, key = blocks(query_fields, self.tile[0]), blocks(key_fields, self.tile[1])
        shape = (*query["position"].shape[:2], key["position"].shape[1])
        query = jax.tree.map(lambda x: x[:, :, None], self.mask.query_summaries(query))
        key = jax.tree.map(lambda x: x[:, None, :], self.mask.key_summaries(key))
        return jnp.broadcast_to(self.mask.verdict(query, key), shape)

    def forward(self, score: Score, q, k, v, query_fields, key_fields, partial: Partial) -> Partial:
        """Adds the keys k, v to `partial`. q as in `queries`; lengths are multiples of the tile."""
        raise NotImplementedError

    def attend(self, score: Score, q, k, v, query_fields, key_fields) -> tuple[jax.Array, jax.Array]:
        """(out (B, K, G, T, V), lse float32 (B, K, G, T)) where these are all the keys. Arguments as in `forward`."""
        partial = Partial.empty(q, v.shape[-1])
        partial = self.forward(score, q, k, v, query_fields, key_fields, partial)
        return partial.finish(self.unit, score.normalised)

    def ring_forward(self, axis: str, shards: int, farthest: int, score: Score, q, k, v, query_fields, key_fields):
        """As `forward`, from nothing, over the keys of the devices of a mesh axis at offsets 0 to the farthest."""
        raise NotImplementedError

    def empty_sums(self, score: Score, q: jax.Array):
        """What `backward` adds to: the gradients of q, in a form of the subclass, and of the score, float32."""
        raise NotImplementedError

    def backward(self, score: Score, q, k, v, d_out, lse, delta, query_fields, key_fields, sums):
        """(sums plus what the pairs (q, k) give, dk, dv), all float32; dk and dv like k and v.

        d_out is (B, K, G, T, V); lse and delta are (B, K, G, T). Lengths are multiples of the tile.
        """
        raise NotImplementedError

    def ring_backward(self, axis, shards, farthest, score, q, k, v, d_out, lse, delta, query_fields, key_fields):
        """As `backward`, to nothing, with the keys that `ring_forward` goes by; dk and dv are those of k and v here."""
        raise NotImplementedError

    def finish_dq(self, sum_of_dq: jax.Array, q: jax.Array) -> jax.Array:
        """The gradient of the queries as they were before `queries` scaled them, heads-major like q."""
        raise NotImplementedError

    def gradients(self, score: Score, q, k, v, d_out, lse, delta, query_fields, key_fields, dtype):
        """(d_score float32, dq, dk, dv in `dtype`) where these are all the pairs.

        Arguments as in `backward`; dq is that of the queries before `queries` scaled them.
        """
        arrays = score, q, k, v, d_out, lse, delta, query_fields, key_fields
        (dq, d_score), dk, dv = self.backward(*arrays, self.empty_sums(score, q))
        return d_score, *(x.astype(dtype) for x in (self.finish_dq(dq, q), dk, dv))

    def _side(self, score: Score, tokens: Mapping, side: int) -> dict[str, jax.Array]:
        position, tile = tokens["position"], self.tile[side]
        needed = (self.mask.query_fields, self.mask.key_fields)[side] - {INSIDE} | score.reads
        padded = {name: _pad(tokens[name], tile, axis=1, mode="edge") for name in needed | {"position"}}
        return {**padded, INSIDE: _pad(jnp.ones_like(position), tile, axis=1)}


class Task(NamedTuple):
    """What attention does to its arrays, whatever these are and wherever they lie. Static.

    Attributes:
      gradients: dtype of dq, dk and dv; None for that of q, k and v. Who adds them up further asks for float32.
    """

    mask: masks.Mask
    scale: float
    tiled: type[Tiled]
    gradients: jnp.dtype | None = None

    def plan(self, q_BTHD: jax.Array, k_BSKD: jax.Array) -> Tiled:
        return self.tiled.plan(self.mask, self.scale, q_BTHD, k_BSKD)

    def plan_attend(self, q_BTHD: jax.Array, k_BSKD: jax.Array) -> Tiled:
        return self.tiled.plan_attend(self.mask, self.scale, q_BTHD, k_BSKD)


def natural(x_BKGTD: jax.Array, length: int) -> jax.Array:
    """Heads-major back to (B, length, H, ...), padding dropped."""
    x = jnp.moveaxis(x_BKGTD[:, :, :, :length], 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def block_length(length: int, longest: int, multiple: int) -> int:
    """Of equal blocks, none longer than `longest`: a multiple of `multiple`, as little padding as that allows."""
    blocks = -(-length // longest)
    return -(-length // (multiple * blocks)) * multiple


def vary_alike(tree):
    """Inside jax.shard_map: every array made to vary over the mesh axes over which any of them does."""
    over = {axis for x in jax.tree.leaves(tree) for axis in _varying(x)}
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(over - _varying(x)), to="varying"), tree)


def zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """float32 zeros that vary over the mesh axes over which `like` does: what loops carry must not change in that."""
    return jax.lax.pcast(jnp.zeros(shape, jnp.float32), tuple(_varying(like)), to="varying")


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _pad(x: jax.Array, multiple: int, axis: int, mode: str = "constant") -> jax.Array:
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], mode=mode) if missing else x
