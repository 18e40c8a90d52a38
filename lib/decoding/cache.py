"""The cache of decoding: the keys and values of the past, and their Tokens, so that masks read them as any others.

A layer that is a recurrence keeps its state instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from striate.lib.tokens import Tokens


class KeyValues(NamedTuple):
    """Keys and values of the layers at one place of the pattern, stacked over its repeats."""

    keys: jax.Array  # (repeats, B, S, K, D)
    values: jax.Array  # (repeats, B, S, K, V)

    def append(self, new: KeyValues, used: jax.Array) -> KeyValues:
        return jax.tree.map(lambda slots, values: _put(slots, values, used, axis=2), self, new)


class Carried(NamedTuple):
    """What a recurrent layer goes on from, stacked over the repeats of the pattern."""

    state: Any  # of the recurrence, whose form is that of the layer
    tail: Any  # of its short convolution; None where it has none

    def append(self, new: Carried, used: jax.Array) -> Carried:
        return jax.tree.map(lambda old, value: value.astype(old.dtype), self, new)


class Both(NamedTuple):
    """What a layer keeps that attends to keys and goes on from a state."""

    attended: KeyValues
    carried: Carried

    def append(self, new: Both, used: jax.Array) -> Both:
        return Both(*(old.append(made, used) for old, made in zip(self, new, strict=True)))


Entry = KeyValues | Carried | Both


class Cache(NamedTuple):
    """A fixed number of slots, filled from the front. A model reads it and returns it with the new tokens appended."""

    layers: tuple[Entry, ...]  # one for each place of the pattern
    tokens: Tokens  # (B, S); the document of an empty slot is -1
    used: jax.Array  # int32 (), the first empty slot

    def append(self, new: tuple[Entry, ...], tokens: Tokens) -> Cache:
        """Puts what the layers made of `tokens` (B, T) into the next T slots; there must be as many left."""
        layers = tuple(layer.append(made, self.used) for layer, made in zip(self.layers, new, strict=True))
        held = jax.tree.map(lambda slots, values: _put(slots, values, self.used, axis=1), self.tokens, tokens)
        return Cache(layers, held, self.used + tokens.shape[1])


def _put(slots, values, used, axis: int):
    return jax.lax.dynamic_update_slice_in_dim(slots, values.astype(slots.dtype), used, axis)
