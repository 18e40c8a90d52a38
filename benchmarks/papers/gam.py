"""Gated Associative Memory: recall farther back than six layers see, and by a linear recurrence; cost by length of row.

striate bench papers/gam
"""

import statistics
import time

import jax
import jax.numpy as jnp
from _common import accuracy, report, small
from flax import linen as nn

from striate import Tokens
from striate.lib.training.data.tasks import Recall
from striate.models.convolutional import GatedMemory
from striate.models.decoder import Layer

FAR = Recall(gap=12)
LENGTHS = 256, 512, 1024, 2048, 4096, 8192
WIDTH = 128


def recall(mixer: str, layers: int) -> float:
    return accuracy(small(FAR, *layers * [Layer(mixer=mixer)]), FAR)


def seconds() -> list[float]:
    """Of as many tokens in rows of each length, one after the other, forward: the median of 100 calls, in turn."""
    module = GatedMemory(heads=1, kv_heads=1, head_dim=WIDTH, out_deviation=1.0, dtype="float32")
    tokens = Tokens.arange(1, LENGTHS[0])
    x = jnp.zeros((1, LENGTHS[0], WIDTH))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(1), x, tokens, tokens))

    @jax.jit
    def run(rows):
        def row(x):
            tokens = Tokens.arange(*x.shape[:2])
            return module.apply(params, x, tokens, tokens)[0]

        return jax.lax.map(row, rows)

    x = jax.random.normal(jax.random.key(0), (max(LENGTHS), WIDTH))
    problems = [x.reshape(-1, 1, length, WIDTH) for length in LENGTHS]
    taken = [[] for _ in LENGTHS]
    for _ in range(101):  # the first of which compiles
        for problem, of_length in zip(problems, taken, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run(problem))
            of_length.append(time.perf_counter() - start)
    return [statistics.median(of_length[1:]) for of_length in taken]


def measure() -> dict[str, float]:
    taken = seconds()
    return {
        "recall over more than 12 tokens": recall("gam", 6),
        "the same of a linear recurrence": recall("gated_linear", 2),
        "cost of a token, dearest over cheapest length": max(taken) / min(taken),
    }


if __name__ == "__main__":
    report(__file__, measure)
