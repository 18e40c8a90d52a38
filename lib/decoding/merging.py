"""Attention over keys that lie in several places: each part attended by itself, the parts merged by log-sum-exp."""

from __future__ import annotations

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from striate.lib import scores
from striate.lib.attention import attention, merge
from striate.lib.masks import Mask, query
from striate.lib.scores import Score
from striate.lib.tokens import Tokens


def relay_attention(
    q_BTHD, prefix_k_1PKD, prefix_v_1PKV, k_BSKD, v_BSKV, *, prefix_mask=None, prefix_tokens=None, **how
):
    """Causal attention of a batch whose rows share a prefix, which is read once for all of them.

    All rows' queries attend to the prefix together, as the rows of one matrix; each row attends to its own keys; the
    two are merged. Where memory is what limits, this is (P + S) / (P / B + S) times as fast as a prefix per row.

    Args:
      q_BTHD, k_BSKD, v_BSKV: as in `attention`, each row's own tokens, which come after the prefix. Their positions
        (rotations, `q_tokens`, `k_tokens`) start at P.
      prefix_k_1PKD, prefix_v_1PKV: the prefix, a batch of one.
      prefix_mask, prefix_tokens: what the queries see of the prefix and its Tokens (1, P), for windows and scores that
        read positions; by default all of it, but nothing for padding.
      how: further arguments of `attention`, for the own keys: mask, score, q_tokens, k_tokens, scale, ...; the score
        and the scale hold for both parts.

    Returns:
      (out, lse) as `attention(..., return_lse=True)` over the concatenated keys.

    Source: Zhu et al. 2024 (RelayAttention), section 3.2.
    """
    each, once = scores.split(how.pop("score", None) or scores.plain())
    q_tokens = how.get("q_tokens") or Tokens.arange(*q_BTHD.shape[:2])
    prefix = {
        "q_tokens": jax.tree.map(_as_one_row, q_tokens),
        "k_tokens": prefix_tokens or Tokens.arange(1, prefix_k_1PKD.shape[1]),
        "mask": query("document", 0) if prefix_mask is None else prefix_mask,
        "scale": how.get("scale"),
        "implementation": how.get("implementation"),
    }
    shared = attention(_as_one_row(q_BTHD), prefix_k_1PKD, prefix_v_1PKV, score=each, return_lse=True, **prefix)
    shared = tuple(x.reshape(*q_BTHD.shape[:2], *x.shape[2:]) for x in shared)
    return once.finish(*merge(shared, attention(q_BTHD, k_BSKD, v_BSKV, score=each, return_lse=True, **how)))


def sharded_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKV: jax.Array,
    *,
    mesh: Mesh,
    axis: str,
    q_tokens: Tokens,
    k_tokens: Tokens,
    mask: Mask | None = None,
    score: Score | None = None,
    scale: float | None = None,
    implementation: str | None = None,
):
    """A few queries, on every device, over keys and values whose length is cut over a mesh axis: decoding.

    Each device attends to its keys, and the partial results, as large as the queries, are gathered and merged: no key
    moves. Which slot of the cache lies where does not matter, since the mask reads `k_tokens`.

    Args:
      axis: mesh axis of the length of k, v and k_tokens.
      others: as in `attention`.

    Returns:
      (out, lse), the same on every device.
    """
    each, once = scores.split(score or scores.plain())
    how = {"mask": mask, "scale": scale, "implementation": implementation, "return_lse": True}

    def shard(q, k, v, q_tokens, k_tokens, each):
        partial = attention(q, k, v, score=each, q_tokens=q_tokens, k_tokens=k_tokens, **how)
        outs, lses = jax.lax.all_gather(partial, axis)
        return merge(*zip(outs, lses, strict=True))

    cut = P(None, axis)
    over_shards = jax.shard_map(
        shard, mesh=mesh, in_specs=(P(), cut, cut, P(), cut, P()), out_specs=P(), check_vma=False
    )
    return once.finish(*over_shards(q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens, each))


def _as_one_row(x):
    return x.reshape(1, -1, *x.shape[2:])
