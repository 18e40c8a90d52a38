"""Efficient Attention: what twice as many tokens cost, beside the same function as a product with all pairs.

striate bench papers/efficient
"""

import itertools
import time

import jax
import jax.numpy as jnp
from _common import report

from striate.lib.noncausal import global_softmax

LENGTHS, WIDTH = (4096, 8192, 16384), 32


def all_pairs(q, f, v):
    """(q softmax(f)^T) v: the weights of all pairs of tokens first."""
    weights = jnp.einsum("bthd,bshd->bhts", q, jax.nn.softmax(f, axis=1))
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def seconds(function, length: int) -> float:
    """The fastest of some calls, and of those that take a second."""
    q, f, v = jax.random.normal(jax.random.key(0), (3, 1, length, 1, WIDTH))
    run, taken = jax.jit(lambda q, f, v: function(jax.nn.softmax(q), f, v)), []
    jax.block_until_ready(run(q, f, v))
    while len(taken) < 3 or sum(taken) < 1:
        start = time.perf_counter()
        jax.block_until_ready(run(q, f, v))
        taken.append(time.perf_counter() - start)
    return min(taken)


def growth(function) -> list[float]:
    """Of the time, from each of LENGTHS to the next."""
    return [later / earlier for earlier, later in itertools.pairwise(seconds(function, length) for length in LENGTHS)]


def measure() -> dict[str, float]:
    linear = growth(global_softmax)
    return {
        "time of twice as many tokens, least": min(linear),
        "time of twice as many tokens, most": max(linear),
        "the same of the product with all pairs, least": min(growth(all_pairs)),
    }


if __name__ == "__main__":
    report(__file__, measure)
