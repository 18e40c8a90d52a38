"""Higher-order linear attention: two hops found by construction, and what float32 loses over 1024 tokens.

striate bench papers/hla
"""

import jax
import jax.numpy as jnp
from _common import report

from striate import linear_attention
from striate.lib.linear_variants import ORDERS, higher_order


def two_hops(pairs: int = 16, width: int = 8) -> tuple[float, float]:
    """Leaves, then pointers to them, then queries for pointers: (error of the asymmetric answers, size of the first
    order's)."""
    eye, leaf = jnp.eye(2 * pairs), jax.random.normal(jax.random.key(0), (pairs, width))
    to = jax.random.permutation(jax.random.key(1), pairs)
    nothing, no_value = jnp.zeros((pairs, 2 * pairs)), jnp.zeros((pairs, width))
    q = jnp.concatenate([nothing, eye[to], eye[pairs:]])[None, :, None]
    k = jnp.concatenate([eye[:pairs], eye[pairs:], nothing])[None, :, None]
    v = jnp.concatenate([leaf, no_value, no_value])[None, :, None]
    found = higher_order(q, k, v, order="asymmetric")[0, 2 * pairs :, 0]
    first = linear_attention(q, k, v)[0, 2 * pairs :, 0]
    return float(abs(found - leaf[to]).max()), float(abs(first).max())


def rounding(order: str, length: int = 1024, width: int = 32) -> float:
    """The greatest error of float32 over the greatest output."""
    with jax.enable_x64(True):
        q, k, v = jax.random.normal(jax.random.key(0), (3, 1, length, 1, width), jnp.float64) * width**-0.5
        true = higher_order(q, k, v, order=order)
        out = higher_order(*(x.astype(jnp.float32) for x in (q, k, v)), order=order)
        return float(abs(out - true).max() / abs(true).max())


def measure() -> dict[str, float]:
    error, first = two_hops()
    return {
        "two hops: error of the asymmetric product": error,
        "two hops: what first order answers": first,
        "float32 against float64, of the greatest output": max(map(rounding, ORDERS)),
    }


if __name__ == "__main__":
    report(__file__, measure)
