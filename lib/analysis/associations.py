"""Associative memories: pairs are stored, every key is asked again, and what comes back is compared with its value.

Linear attention without a decay is the sum of v k^T over the pairs, and answers a stored key k_i with

    |k_i|^2 v_i + sum over j != i of (k_j . k_i) v_j

so that orthogonal keys bring back their values, and random ones something else beside them: for n pairs of random unit
keys of width d and unit values the squared error is (n - 1) / d in the mean, and the cosine 1 / sqrt(1 + (n - 1) / d).

Source: Qiao 2025 (Understanding transformers through the lens of Pavlovian conditioning).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def retrieved(memory: Callable, k_BND: jax.Array, v_BNV: jax.Array) -> jax.Array:
    """(B, N, V): what a memory answers to each key after it has been given all pairs, one after the other.

    Args:
      memory: called as (q, k, v), each (B, T, 1, width), for out (B, T, 1, V), causal; a key of zeros writes nothing.
      k_BND, v_BNV: the pairs.
    """
    q, k, v = (
        jnp.concatenate([x, y], axis=1)[:, :, None]
        for x, y in ((jnp.zeros_like(k_BND), k_BND), (k_BND, jnp.zeros_like(k_BND)), (v_BNV, jnp.zeros_like(v_BNV)))
    )
    return memory(q, k, v)[:, k_BND.shape[1] :, 0]


def cosines(x: jax.Array, y: jax.Array) -> jax.Array:
    """Of the angles between vectors, over the last axis."""
    return (x * y).sum(-1) / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1))
