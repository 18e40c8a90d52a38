"""Linear attention as an associative memory: fidelity of n random pairs in a width d, against what the law says.

striate bench papers/pavlov
"""

import jax
import jax.numpy as jnp
from _common import report

from striate import linear_attention
from striate.lib.analysis.associations import cosines, retrieved

MEMORIES = 64


def recalled(pairs: int, width: int) -> tuple[float, float]:
    """Of random unit keys and values: (squared error, cosine), in the mean."""
    x = jax.random.normal(jax.random.key(pairs), (2, MEMORIES, pairs, width))
    k, v = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    got = retrieved(linear_attention, k, v)
    return float(((got - v) ** 2).sum(-1).mean()), float(cosines(got, v).mean())


def measure() -> dict[str, float]:
    errors = [abs(recalled(pairs, 64)[0] / ((pairs - 1) / 64) - 1) for pairs in (8, 16, 32, 64)]
    sizes = [(width * times // 4, width) for width in (64, 256) for times in (1, 2, 4, 8)]
    angles = [abs(recalled(*size)[1] - (1 + (size[0] - 1) / size[1]) ** -0.5) for size in sizes]
    return {"squared error over its law less 1, most": max(errors), "cosine less its law, most": max(angles)}


if __name__ == "__main__":
    report(__file__, measure)
