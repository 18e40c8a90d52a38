"""Lightning Attention: what a token costs in chunks and in the quadratic form, forward, on the default device.

striate bench papers/lightning
"""

import time

import jax
from _common import report

from striate import linear_attention
from striate.lib.linear_variants import lightning_log_decay

HEADS, WIDTH = 4, 64


def seconds(length: int, implementation: str) -> float:
    """The fastest of some calls, and of those that take half a second."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, length, HEADS, WIDTH))
    decay = lightning_log_decay(HEADS)
    run = jax.jit(lambda q, k, v: linear_attention(q, k, v, log_decay=decay, implementation=implementation))
    jax.block_until_ready(run(q, k, v))
    taken = []
    while len(taken) < 3 or sum(taken) < 0.5:
        start = time.perf_counter()
        jax.block_until_ready(run(q, k, v))
        taken.append(time.perf_counter() - start)
    return min(taken)


def measure() -> dict[str, float]:
    def growth(implementation: str) -> float:
        return seconds(8192, implementation) / 8 / seconds(1024, implementation)

    return {
        "cost of a token at 8192 over 1024 tokens": growth("xla"),
        "the same of the quadratic form": growth("parallel"),
        "times faster than it at 4096": seconds(4096, "parallel") / seconds(4096, "xla"),
    }


if __name__ == "__main__":
    report(__file__, measure)
