"""Latte: recall beside a plain recurrence, both behind a short convolution; cost of a decoded token, early and late.

striate bench papers/latte
"""

import time

import jax
from _common import accuracy, report, small

from striate.lib.linear_variants import running_softmax
from striate.lib.training.data.tasks import Recall
from striate.models.decoder import Layer

HEADS, WIDTH = 4, 64
EARLY, LATE = 100, 10_000


def decoding(length: int):
    """(what computes the next token after so many, bytes of the state that it goes on from)."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, length, HEADS, WIDTH))
    _, state = running_softmax(jax.nn.softmax(q), k, v, return_state=True)
    now = tuple(x[:, -1:] for x in (jax.nn.softmax(q), k, v))
    step = jax.jit(lambda state: running_softmax(*now, initial_state=state, return_state=True))
    return lambda: jax.block_until_ready(step(state)), sum(x.nbytes for x in jax.tree.leaves(state))


def seconds(*steps) -> list[float]:
    """The fastest of many calls of each, in turn."""
    taken = [[] for _ in steps]
    for _ in range(500):
        for step, of_step in zip(steps, taken, strict=True):
            start = time.perf_counter()
            step()
            of_step.append(time.perf_counter() - start)
    return list(map(min, taken))


def measure() -> dict[str, float]:
    (early, of_early), (late, of_late) = decoding(EARLY), decoding(LATE)
    first, second = seconds(early, late)
    latte, plain = (accuracy(small(Recall(), Layer(mixer=name)), Recall()) for name in ("latte", "gated_linear"))
    return {
        "recall, less that of a plain recurrence": latte - plain,
        f"time of token {LATE} over token {EARLY}": second / first,
        "the same of the bytes of the state": of_late / of_early,
    }


if __name__ == "__main__":
    report(__file__, measure)
