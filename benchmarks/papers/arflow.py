"""ARFlow: points of one of eight Gaussians on a circle, which noise hides the less the later they come.

A point is a frame of two tokens, its coordinates, beside the time of its noise. What a model gives is the velocity from
noise to data. One model has rows of five points, one has single points, as many of them, and both are asked for the
velocity of the fifth points of the same rows. Knowing all five best possible answers are wrong by 0.90 in the mean
square, knowing one by 1.06: of eight means at a radius of 2, with deviations of 0.2.

striate bench papers/arflow
"""

import dataclasses

import jax
import jax.numpy as jnp
from _common import fit, report
from flax import linen as nn

from striate import Tokens
from striate.lib.positions import sinusoidal
from striate.models.continuous import Stack
from striate.models.decoder import DecoderConfig, Layer
from striate.models.mixers import MIXERS

ANGLES = jnp.arange(8) * jnp.pi / 4
MEANS, DEVIATION = 2 * jnp.stack([jnp.cos(ANGLES), jnp.sin(ANGLES)], axis=1), 0.2
POINTS, SIZES = 5, {"width": 64, "heads": 4, "kv_heads": 4, "head_dim": 16, "hidden": 128, "layers": 2}


def sample(key, points: int):
    """(tokens with the time, (2 points, 19), the velocity of the coordinate of each, (2 points, 1))."""
    of_class, of_time, *of_ends = jax.random.split(key, 4)
    time = jnp.sort(jax.random.uniform(of_time, (points, 1)), axis=0)
    data, noise = (jax.random.normal(key, (points, 2)) for key in of_ends)
    data = MEANS[jax.random.randint(of_class, (), 0, 8)][None] + DEVIATION * data
    x = time * data + (1 - time) * noise
    time = jnp.broadcast_to(sinusoidal(1000 * time, 16), (points, 2, 16))
    axis = jnp.broadcast_to(jnp.eye(2)[None], (points, 2, 2))
    features = jnp.concatenate([x[..., None], axis, time], axis=2)
    return features.reshape(2 * points, -1), (data - noise).reshape(-1, 1)


def rows(key, count: int, points: int):
    return jax.vmap(lambda key: sample(key, points))(jax.random.split(key, count))


def measure() -> dict[str, float]:
    MIXERS["arflow"] = dataclasses.replace(MIXERS["arflow"], options={"frame": 2})
    layer = Layer(mixer="arflow", position="NoPE()")
    model = Stack(DecoderConfig(pattern=(layer,), **SIZES), outputs=1)
    start, data, held_out = jax.random.split(jax.random.key(0), 3)
    x, velocity = rows(held_out, 16384, POINTS)

    def error(params, x, velocity):
        return ((model.apply(params, x, Tokens.arange(*x.shape[:2]))[:, -velocity.shape[1] :] - velocity) ** 2).mean()

    def of_last(points: int) -> float:
        """The error at the fifth points of a model of so many, which sees no more of a row."""
        params = nn.unbox(jax.jit(model.init)(start, x[:1, -2 * points :], Tokens.arange(1, 2 * points)))
        batch = 64 * POINTS // points
        params = fit(lambda params, key: error(params, *rows(key, batch, points)), params, 1000, 3e-3, data)
        return float(jax.jit(error)(params, x[:, -2 * points :], velocity[:, -2:]))

    alone, fifth = of_last(1), of_last(POINTS)
    return {"velocity error after four points over that of the point alone": fifth / alone}


if __name__ == "__main__":
    report(__file__, measure)
