"""VSSD: every token gives the mean over all tokens of sin(x), and the first ones have hardly any of them before them.

Rows have an offset of their own, from which a causal model can guess. Errors are over the variance of the targets.

striate bench papers/vssd
"""

import jax
import jax.numpy as jnp
from _common import normalised_error, report

from striate.models.continuous import Stack
from striate.models.decoder import DecoderConfig, Layer

LENGTH, CHANNELS = 48, 2


def sample(key):
    of_row, of_tokens = jax.random.split(key)
    x = jax.random.normal(of_row, (1, CHANNELS)) + jax.random.normal(of_tokens, (LENGTH, CHANNELS))
    return x, jnp.full((LENGTH, 1), jnp.sin(x).mean())


def error(mixer: str) -> float:
    sizes = {"width": 32, "heads": 4, "kv_heads": 1, "head_dim": 16, "hidden": 64, "layers": 1}
    model = Stack(DecoderConfig(pattern=(Layer(mixer=mixer),), **sizes), outputs=1)
    return normalised_error(model, sample, steps=800, slots=slice(LENGTH // 4))


def measure() -> dict[str, float]:
    of_vssd = error("vssd")
    return {
        "error of a mean over all tokens at the first quarter": of_vssd,
        "times that of the causal recurrence": error("gated_linear") / of_vssd,
    }


if __name__ == "__main__":
    report(__file__, measure)
