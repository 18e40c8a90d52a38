"""Models of continuous sequences: vectors in and vectors out, where a decoder has ids.

`Stack` is the layers of a decoder between two projections. `HiSS` has two of them at two rates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from striate.lib.errors import UserError
from striate.lib.parallel import Across
from striate.lib.tokens import PADDING, Tokens
from striate.models.decoder import Block, DecoderConfig
from striate.models.layers import RMSNorm


class Stack(nn.Module):
    """(B, T, C) to (B, T, outputs): a projection, the layers of `config`, a norm and a projection.

    Attributes:
      config: its vocabulary is not read.
      outputs: width of what comes out.
      parallel: how the layers cross devices.
    """

    config: DecoderConfig
    outputs: int
    parallel: Across | None = None

    @nn.compact
    def __call__(self, x_BTC: jax.Array, tokens: Tokens) -> jax.Array:
        config = self.config
        x_BTE = nn.Dense(config.width, dtype=config.compute_dtype, name="in")(x_BTC)
        for number in range(config.layers):
            layer = config.pattern[number % len(config.pattern)]
            x_BTE, _ = Block(config, layer, self.parallel, name=f"layer_{number}")(x_BTE, tokens, tokens, None)
        return nn.Dense(self.outputs, dtype=config.compute_dtype, name="out")(RMSNorm(name="norm")(x_BTE))


class HiSS(nn.Module):
    """Hierarchical state space models: one vector for every `chunk` samples, and a stack over these vectors.

    The low level begins anew in every chunk, and what it gives at the last sample of one is what the high level reads.

    Attributes:
      low: layers of the low level; None for none: what is read is the last sample as it is.
      high: layers of the high level; None for none: the low level gives the outputs.
      chunk: samples for one output.
      outputs: width of an output.

    Source: Bhirangi et al. 2024 (HiSS).
    """

    low: DecoderConfig | None
    high: DecoderConfig | None
    chunk: int
    outputs: int
    parallel: Across | None = None

    @nn.compact
    def __call__(self, x_BTC: jax.Array, tokens: Tokens) -> jax.Array:
        """(B, T / chunk, outputs), each from the samples of its chunk and the ones before.

        Args:
          x_BTC: samples, standardised.
          tokens: their Tokens in the order of the sequence; documents begin at multiples of `chunk`, positions at 0.

        Raises:
          UserError: a length that is no multiple of `chunk`.
        """
        if x_BTC.shape[1] % self.chunk:
            raise UserError(f"{x_BTC.shape[1]} samples are no multiple of the chunk {self.chunk}: pad them at the end.")
        x = with_differences(x_BTC, tokens)
        if self.low:
            width = self.high.width if self.high else self.outputs
            x = Stack(self.low, width, self.parallel, name="low")(x, chunks(tokens, self.chunk))
        x, tokens = jax.tree.map(lambda x: x[:, self.chunk - 1 :: self.chunk], (x, tokens))
        if not self.high:
            return x
        tokens = tokens.replace(position=tokens.position // self.chunk)
        return Stack(self.high, self.outputs, self.parallel, name="high")(x, tokens)


def chunks(tokens: Tokens, size: int) -> Tokens:
    """The same tokens, where every `size` of a document are a document of their own."""
    number = tokens.document * (tokens.shape[1] // size + 1) + tokens.position // size
    document = jnp.where(tokens.document == PADDING, PADDING, number)
    return tokens.replace(document=document, position=tokens.position % size)


def with_differences(x_BTC: jax.Array, tokens: Tokens) -> jax.Array:
    """(B, T, 2 C): x, and by how much it differs from the token before; 0 where a document begins."""
    before, document = (jnp.concatenate([x[:, :1], x[:, :-1]], axis=1) for x in (x_BTC, tokens.document))
    same = (document == tokens.document)[..., None]
    return jnp.concatenate([x_BTC, jnp.where(same, x_BTC - before, 0)], axis=2)
