"""TRecViT: recurrences over time, one at every place of a frame, and attention over the places of a frame."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from striate.lib.decoding.cache import Carried
from striate.lib.parallel import Across
from striate.lib.tokens import Tokens
from striate.models.decoder import Block, DecoderConfig, Layer, mixer
from striate.models.layers import RMSNorm, weight
from striate.models.mixers import MIXERS

OVER_TIME = Layer(mixer="gated_lru")
OVER_SPACE = Layer(mask="same('document') & same('frame')", position="NoPE()")


class TRecViT(nn.Module):
    """Patches of frames to hidden states of patches; causal in time, and of constant memory over it.

    Attributes:
      config: layers of the pattern that recur go over time, each by itself; those that attend go over the places of a
        frame, and have the feed-forward network behind them. Its vocabulary is not read.
      parallel: how recurrences cross the devices that hold frames; attention stays in a frame.

    Source: Patraucean et al. 2024 (TRecViT).
    """

    config: DecoderConfig
    parallel: Across | None = None

    @property
    def dtype(self) -> str:
        return self.config.compute_dtype

    @nn.compact
    def __call__(self, patches_BFNC: jax.Array, tokens: Tokens, past: tuple[Carried, ...] | None = None):
        """Goes on from `past`, when given.

        Args:
          patches_BFNC: (batch, frames, patches, channels).
          tokens: of the frames, (batch, frames), in the order of time: a document is a clip.
          past: what the frames before gave.

        Returns:
          (hidden states (batch, frames, patches + 1, width), the last of a frame for all of it; what to go on from).
        """
        config, new = self.config, []
        (batch, frames, places, _), width = patches_BFNC.shape, config.width
        x = nn.Dense(width, dtype=self.dtype, name="patches")(patches_BFNC)
        x += weight(self, "position", (places, width), (None, "embed"), width**-0.5)[None, None]
        whole = weight(self, "whole", (width,), ("embed",), 0.0)
        x_BFNE = jnp.concatenate([x, jnp.broadcast_to(whole, (batch, frames, 1, width))], axis=2)
        for number in range(config.layers):
            layer = config.pattern[number % len(config.pattern)]
            if MIXERS[layer.mixer].recurs:
                x_BFNE, kept = self._over_time(layer, number, x_BFNE, tokens, past and past[len(new)])
                new.append(kept)
            else:
                x_BFNE = self._over_space(layer, number, x_BFNE, tokens)
        return RMSNorm(name="norm")(x_BFNE), tuple(new)

    def _over_time(self, layer: Layer, number: int, x_BFNE, tokens: Tokens, past: Carried | None):
        x = x_BFNE.swapaxes(1, 2)
        rows, tokens = x.reshape(-1, *x.shape[2:]), tokens.map(lambda field: field.repeat(x.shape[1], axis=0))
        mix = mixer(self.config, layer, self.parallel, name=f"time_{number}")
        mixed, kept = mix(RMSNorm(name=f"time_norm_{number}")(rows), tokens, tokens, past)
        return x_BFNE + mixed.reshape(x.shape).swapaxes(1, 2), kept

    def _over_space(self, layer: Layer, number: int, x_BFNE, tokens: Tokens):
        x, tokens = x_BFNE.reshape(x_BFNE.shape[0], -1, x_BFNE.shape[3]), tokens.replace(frame=tokens.position)
        tokens = tokens.map(lambda field: field.repeat(x_BFNE.shape[2], axis=1))
        return Block(self.config, layer, name=f"space_{number}")(x, tokens, tokens, None)[0].reshape(x_BFNE.shape)
