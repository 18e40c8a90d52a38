"""The cache of decoding: the keys and values of the past, and their Tokens, so that masks read them as any others."""

from __future__ import annotations

from typing import NamedTuple

import jax

from striate.lib.tokens import Tokens


class KeyValues(NamedTuple):
    """Keys and values of the layers at one place of the pattern, stacked over its repeats."""

    keys: jax.Array  # (repeats, B, S, K, D)
    values: jax.Array  # (repeats, B, S, K, V)


class Cache(NamedTuple):
    """A fixed number of slots, filled from the front. A model reads it and returns it with the new tokens appended."""

    layers: tuple[KeyValues, ...]  # one for each place of the pattern
    tokens: Tokens  # (B, S); the document of an empty slot is -1
    used: jax.Array  # int32 (), the first empty slot

    def append(self, new: tuple[KeyValues, ...], tokens: Tokens) -> Cache:
        """Puts the keys and values of `tokens` (B, T) into the next T slots; there must be as many left."""

        def put(slots, values, axis: int):
            values = values.astype(slots.dtype)
            return jax.lax.dynamic_update_slice_in_dim(slots, values, self.used, axis)

        return Cache(
            jax.tree.map(lambda slots, values: put(slots, values, axis=2), self.layers, new),
            jax.tree.map(lambda slots, values: put(slots, values, axis=1), self.tokens, tokens),
            self.used + tokens.shape[1],
        )
