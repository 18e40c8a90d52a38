"""A softmax decoder becomes one with memory as a gate, and its share of the outputs rises while adapters are trained.

    config, params = convert(config, params)                        # mixer "attention" -> "tptt", by the same weights
    adapters = lora.init(key, params)
    params = with_mag(lora.merge(params, adapters), mag_at(step))   # in the loss of every step

Source: Furfaro 2025 (TPTT).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import traverse_util

from striate.models.decoder import DecoderConfig, Layer

BEFORE, AFTER = "attention", "tptt"


def convert(config: DecoderConfig, params, mag: float = 0.5) -> tuple[DecoderConfig, dict]:
    """(config, parameters) of the same decoder with every layer of softmax attention made a "tptt" layer.

    Args:
      params: of a Decoder of this config, without boxes; their arrays are not copied.
      mag: mu. At 0 the outputs are those of the decoder that is converted, bit for bit.
    """

    def converted(layer: Layer) -> Layer:
        return dataclasses.replace(layer, mixer=AFTER) if layer.mixer == BEFORE else layer

    found = {}
    for path, x in traverse_util.flatten_dict(params).items():
        found[tuple(AFTER if part == BEFORE else part for part in path)] = x
        if path[-2:] == (BEFORE, "out"):
            found[*path[:-2], AFTER, "mag"] = jnp.full(len(x), mag, jnp.float32)  # one for each repeat of the pattern
    pattern = tuple(map(converted, config.pattern))
    return dataclasses.replace(config, pattern=pattern), traverse_util.unflatten_dict(found)


def with_mag(params, mag: float | jax.Array):
    """The same parameters with this mu in all layers that have one."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {path: jnp.full_like(x, mag) if path[-1] == "mag" else x for path, x in flat.items()}
    )


def mag_at(step: float | jax.Array, steps: int = 100, mag: float = 0.5) -> jax.Array:
    """mu at a step of training: from 0 up to `mag` over so many steps, and there it stays."""
    return mag * jnp.clip(step / steps, 0.0, 1.0)
