"""HiSS: the sum over the chunks so far of the mean of |x| in each, less its expectation; from 256 rows.

Errors are over the variance of the targets. One chunk says nothing of those before it.

striate bench papers/hiss
"""

import jax
import jax.numpy as jnp
from _common import normalised_error, report

from striate.models.continuous import HiSS
from striate.models.decoder import DecoderConfig, Layer

LENGTH, CHUNK = 100, 10


def sample(key):
    x = (jnp.pi / 2) ** 0.5 * jax.random.normal(key, (LENGTH, 1))  # so that |x| has the mean 1
    return x, jnp.cumsum(jnp.abs(x).reshape(-1, CHUNK).mean(1) - 1)[:, None]


def measure() -> dict[str, float]:
    # Small, since larger levels know 256 rows by heart.
    sizes = {"width": 16, "heads": 1, "kv_heads": 1, "head_dim": 16, "hidden": 16}
    level = DecoderConfig(layers=1, pattern=(Layer(mixer="gated_lru"),), **sizes)

    def error(high) -> float:
        return normalised_error(HiSS(level, high, CHUNK, outputs=1), sample, steps=600, known=256)

    return {"error of a sum over chunks": error(level), "the same without the high level": error(None)}


if __name__ == "__main__":
    report(__file__, measure)
