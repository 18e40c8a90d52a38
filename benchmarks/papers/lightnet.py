"""LightNet: how far the first token reaches, and what one pass over an image sees.

striate bench papers/lightnet
"""

import jax
import jax.numpy as jnp
from _common import report

from striate import linear_attention
from striate.lib.linear_variants import running_softmax
from striate.lib.noncausal import global_softmax

LENGTH, SIDE = 4096, 16


def influence(attend) -> float:
    """Of the value of token 0 on the last output, over that of the query: logits are 0."""
    one = jnp.ones((1, LENGTH, 1, 1))
    return float(jax.grad(lambda v: attend(one, v)[0, -1, 0, 0])(one)[0, 0, 0, 0])


def corners() -> int:
    """The fewest corners that a pixel's output depends on."""
    q, f, v = jax.random.normal(jax.random.key(0), (3, 1, SIDE * SIDE, 1, 8))
    slopes = jax.jacrev(lambda v: global_softmax(jax.nn.silu(q), f, v)[0, :, 0, 0])(v)[:, 0, :, 0, 0]
    return int((slopes.reshape(SIDE * SIDE, SIDE, SIDE)[:, :: SIDE - 1, :: SIDE - 1] != 0).sum((1, 2)).min())


def measure() -> dict[str, float]:
    decay = jnp.log(jnp.full(1, 0.99))
    return {
        "influence of the first token at 4096, over 1 / 4096": LENGTH
        * influence(lambda one, v: running_softmax(one, 0 * one, v)),
        "the same of a decay of 0.99": LENGTH
        * influence(lambda one, v: linear_attention(one, one, v, log_decay=decay)),
        "corners of an image that one pass to both sides sees, least": corners(),
    }


if __name__ == "__main__":
    report(__file__, measure)
