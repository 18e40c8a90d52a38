"""Mesa-optimisation: the step that a trained linear layer takes, beside the best one in theory.

striate bench papers/mesa

Sequences x_{t+1} = W x_t with W = diag(e^{i theta}), theta uniform. The blocks a and b of the two matrices of the layer
are trained by gradient descent from 0.1 on half the squared error, summed over a sequence; their product is the step.
With the moments m2 = E x^4, m3 = E x^6 and m24 = sum over others E x_1^2 x_r^4 of the first state it should become

    m2 / (m3 + m24 / (T - 2) sum_{t=2}^{T-1} 1 / (t - 1))
"""

import jax
import jax.numpy as jnp
from _common import report

from striate.lib.linear_variants import least_squares_step

WIDTH, LENGTH, ROWS, STEPS = 5, 50, 2000, 400
# First states, their moments (m2, m3, m24), and the rate at which the two blocks learn.
STARTS = {
    "ones": (lambda key: jnp.ones((ROWS, WIDTH)), (1.0, 1.0, WIDTH - 1.0), 2e-3),
    "sparse": (
        lambda key: jax.nn.one_hot(jax.random.randint(key, (ROWS,), 0, WIDTH), WIDTH),
        (1 / WIDTH, 1 / WIDTH, 0.0),
        5e-3,
    ),
    "gaussian": (
        lambda key: 0.5 * jax.random.normal(key, (ROWS, WIDTH)),
        (3 * 0.5**4, 15 * 0.5**6, 3 * (WIDTH - 1) * 0.5**6),
        2e-3,
    ),
}


def step(name: str) -> float:
    """The learned one over the best one."""
    first, (m2, m3, m24), rate = STARTS[name]
    of_first, of_angle = jax.random.split(jax.random.key(0))
    angle = jax.random.uniform(of_angle, (ROWS, WIDTH), maxval=2 * jnp.pi)
    turns = jnp.exp(1j * angle[:, None] * jnp.arange(LENGTH)[None, :, None])
    x = (first(of_first)[:, None] * turns)[:, :, None]
    unit = jax.jit(least_squares_step)(x)

    def loss(blocks):
        error = blocks[0] * blocks[1] * unit[:, 1:-1] - x[:, 2:]
        return 0.5 * (abs(error) ** 2).sum() / ROWS

    descend = jax.jit(lambda blocks: blocks - rate * jax.grad(loss)(blocks))
    blocks = jnp.full(2, 0.1)
    for _ in range(STEPS):
        blocks = descend(blocks)
    best = m2 / (m3 + m24 / (LENGTH - 2) * sum(1 / (t - 1) for t in range(2, LENGTH)))
    return float(blocks.prod()) / best


def measure() -> dict[str, float]:
    return {f"learned step over the best one, off by: {name}": abs(step(name) - 1) for name in STARTS}


if __name__ == "__main__":
    report(__file__, measure)
