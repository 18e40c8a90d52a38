"""The decoder: a language model whose layers each choose a mixer and a mask, in any token order, on any mesh."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from striate.lib import masks, positions
from striate.lib.decoding.cache import Cache, Entry, KeyValues
from striate.lib.errors import UserError
from striate.lib.parallel import Across
from striate.lib.tokens import PADDING, Tokens
from striate.models.layers import Blend, NgramEmbedding, RMSNorm, SwiGLU, weight
from striate.models.mixers import MIXERS
from striate.models.scores import parse as parse_score

# What the backward pass finds saved of a layer, besides its input; the rest it computes again.
_SAVED = {"layer": (), "attention": ("attention_out", "attention_lse")}
REMAT = ("none", *_SAVED)


@dataclass(frozen=True)
class Layer:
    """One place of the pattern: which mixer, under which mask, with which positions and which score."""

    mixer: str = "attention"
    """Or any other of striate.models.mixers; a recurrence reads no mask, position or score: "gated_delta", ..."""
    mask: str = "causal() & same('document')"
    """Text, as `striate show mask` prints it."""
    position: str = "Rope(theta=10000.0)"
    """Text too: "NoPE()", "Rope(theta=500000.0, scaling=YaRN(factor=8.0, length=4096))", "XPos(span=(0, 4095))"."""
    score: str = "plain()"
    """And this: "compose(softcap(50.0), alibi())", "sink_logit()"; striate.models.scores says what is learned."""


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Raises:
      UserError: sizes that do not divide, an unknown choice, or a mask or a position that cannot be read.
    """

    vocabulary: int = 264
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 768
    """Width inside the feed-forward network."""
    pattern: tuple[Layer, ...] = (Layer(),)
    """Repeated down the stack."""
    ngram_orders: tuple[int, ...] = ()
    """The n of the hashed n-grams embedded beside each token; empty for none."""
    ngram_buckets: int = 16_384
    ngram_width: int = 64
    remat: str = "none"
    """Computed again in the backward pass: "none", the whole "layer", or all but its "attention"."""
    compute_dtype: str = "float32"
    loss_chunk: int = 1024
    """Tokens whose logits exist at the same time, on each device."""
    implementation: str | None = None
    """Of attention: "reference", "xla", ...; None for the best on the device."""

    def __post_init__(self):
        for name in ("vocabulary", "width", "layers", "heads", "kv_heads", "head_dim", "hidden", "loss_chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it has to be at least 1.")
        _divides("heads", self.heads, "kv_heads", self.kv_heads)
        if not self.pattern:
            raise UserError("pattern is empty; it needs at least one Layer().")
        _divides("layers", self.layers, "the length of the pattern,", len(self.pattern))
        for layer in self.pattern:
            _choice("mixer", layer.mixer, MIXERS)
            masks.parse(layer.mask)
            positions.parse(layer.position).check(self.head_dim)
            parse_score(layer.score)
        _choice("remat", self.remat, REMAT)
        _choice("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        if any(n < 1 for n in self.ngram_orders):
            raise UserError(f"ngram_orders is {self.ngram_orders}; each has to be at least 1.")
        if self.ngram_orders and min(self.ngram_buckets, self.ngram_width) < 1:
            raise UserError(
                f"ngram_buckets is {self.ngram_buckets} and ngram_width {self.ngram_width}; "
                f"both have to be at least 1, or ngram_orders empty."
            )

    @property
    def repeats(self) -> int:
        """How often the pattern is repeated."""
        return self.layers // len(self.pattern)

    @property
    def sees_later(self) -> tuple[str, ...]:
        """The mixers of the pattern by which a token reads later ones."""
        return tuple(layer.mixer for layer in self.pattern if MIXERS[layer.mixer].sees_later)

    def check_next_token(self) -> None:
        """Raises UserError where the next token would be predicted from itself."""
        for name in self.sees_later:
            causal = ", ".join(repr(name) for name, kind in MIXERS.items() if not kind.sees_later)
            raise UserError(
                f"mixer {name!r} sees later tokens, and the objective is the next token: every target would be read. "
                f"Use one of {causal}, or train it on targets that are not among its inputs."
            )

    @property
    def embedding_deviation(self) -> float:
        """Of the embedding: logits start with a deviation of 1/2, near a uniform guess."""
        return 0.5 * self.width**-0.5

    @property
    def out_deviation(self) -> float:
        """Of the projections back into the residual stream: 1 / sqrt(2 layers) smaller (Radford et al. 2019)."""
        return self.width**-0.5 * (2 * self.layers) ** -0.5


def _divides(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        down, up = value - value % divisor, value - value % divisor + divisor
        raise UserError(
            f"{name} is {value}, which is no multiple of {divisor_name} {divisor}: "
            f"use {f'{down} or ' if down else ''}{up}."
        )


def _choice(name: str, value: str, known) -> None:
    if value not in known:
        raise UserError(f"{name} is {value!r}; there are {', '.join(map(repr, known))}.")


def mixer(config: DecoderConfig, layer: Layer, parallel: Across | None, name: str | None = None) -> nn.Module:
    """The module of a layer, called as (x, tokens, k_tokens, past), which gives (output or Blend, what to cache)."""
    kind = MIXERS[layer.mixer]
    sizes = {"heads": config.heads, "kv_heads": config.kv_heads, "head_dim": config.head_dim}
    given = {"name": name, **sizes, "out_deviation": config.out_deviation, "dtype": config.compute_dtype}
    if kind.attends:
        mask, position = masks.parse(layer.mask), positions.parse(layer.position)
        given |= {"mask": mask, "position": position, "score": layer.score, "implementation": config.implementation}
        given |= {"parallel": parallel and parallel.attention}
    if kind.recurs:
        given |= {"recurrence" if kind.attends else "parallel": parallel and parallel.recurrence}
    return kind.module(**given, **kind.options)


class Block(nn.Module):
    """One layer: a mixer and a feed-forward network, each on a normalised copy of the residual stream."""

    config: DecoderConfig
    layer: Layer
    parallel: Across | None = None

    @nn.compact
    def __call__(self, x_BTE: jax.Array, tokens: Tokens, k_tokens: Tokens, past: Entry | None):
        config, axes = self.config, ("batch", "length", "embed")
        mix = mixer(config, self.layer, self.parallel, name=self.layer.mixer)
        mixed_BTE, new = mix(RMSNorm(name="mixer_norm")(x_BTE), tokens, k_tokens, past)
        x_BTE = mixed_BTE.onto(x_BTE) if isinstance(mixed_BTE, Blend) else x_BTE + mixed_BTE
        x_BTE = nn.with_logical_constraint(x_BTE, axes)
        feed_forward = SwiGLU(config.hidden, config.out_deviation, config.compute_dtype, name="feed_forward")
        x_BTE += feed_forward(RMSNorm(name="feed_forward_norm")(x_BTE))
        return nn.with_logical_constraint(x_BTE, axes), new


class Pattern(nn.Module):
    """The pattern once: the body of the scan over its repeats."""

    config: DecoderConfig
    parallel: Across | None = None

    @nn.compact
    def __call__(self, x_BTE: jax.Array, tokens: Tokens, k_tokens: Tokens, past: tuple[Entry, ...] | None):
        block, remat, new = Block, self.config.remat, []
        if remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*_SAVED[remat])
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        for place, layer in enumerate(self.config.pattern):
            module = block(self.config, layer, self.parallel, name=f"layer_{place}")
            x_BTE, keys_values = module(x_BTE, tokens, k_tokens, past and past[place])
            new.append(keys_values)
        return x_BTE, past and tuple(new)


class Decoder(nn.Module):
    """Token ids to hidden states; `logits` turns those into scores of the next token.

    The parameter "embedding" (vocabulary, width) is both the input table and, transposed, the output projection.
    """

    config: DecoderConfig
    parallel: Across | None = None

    @property
    def dtype(self) -> str:
        return self.config.compute_dtype

    def setup(self):
        config = self.config
        shape = config.vocabulary, config.width
        self.table = weight(self, "embedding", shape, ("vocabulary", "embed"), config.embedding_deviation)
        if config.ngram_orders:
            self.ngrams = NgramEmbedding(config.ngram_buckets, config.ngram_width, config.width, config.compute_dtype)
        self.layers = nn.scan(
            Pattern,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=config.repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, self.parallel)
        self.final_norm = RMSNorm()

    def __call__(self, inputs_BT: jax.Array, tokens: Tokens, ngrams_BTO=None, cache: Cache | None = None):
        """Runs the stack on tokens in any order.

        Args:
          inputs_BT: token ids, int32 (batch, length).
          tokens: their Tokens.
          ngrams_BTO: ids of `lib.ngrams.ngram_ids`, one per order of the config; needed when there are orders.
          cache: what came before, with room for these tokens.

        Returns:
          The hidden states (batch, length, width), normalised; with a cache, (hidden states, the cache after).

        Raises:
          UserError: shapes or dtypes that do not fit, or a mask that reads a field the Tokens do not have.
        """
        self._check(inputs_BT, tokens, ngrams_BTO)
        x_BTE = self._embed(inputs_BT, ngrams_BTO)
        k_tokens, past = tokens, None
        if cache is not None:
            k_tokens = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), cache.tokens, tokens)
            past = cache.layers
        x_BTE, new = self.layers(x_BTE, tokens, k_tokens, past)
        hidden_BTE = self.final_norm(x_BTE)
        return hidden_BTE if cache is None else (hidden_BTE, cache.append(new, tokens))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores of the next token, float32 (..., vocabulary)."""
        return jnp.einsum("...e,ve->...v", hidden, self.table, preferred_element_type=jnp.float32)

    def _embed(self, inputs_BT, ngrams_BTO):
        config = self.config
        # Entries of size 1, the halves exchanged: the tied output would else start by predicting the input again.
        table_VE = jnp.roll(self.table, config.width // 2, axis=1) / config.embedding_deviation
        x_BTE = table_VE[inputs_BT]
        if config.ngram_orders:
            x_BTE = (x_BTE + self.ngrams(ngrams_BTO)) * 2**-0.5
        return nn.with_logical_constraint(x_BTE, ("batch", "length", "embed"))

    def _check(self, inputs_BT, tokens, ngrams_BTO):
        if inputs_BT.ndim != 2 or not jnp.issubdtype(inputs_BT.dtype, jnp.integer):
            raise UserError(
                f"The decoder got inputs of shape {inputs_BT.shape} and dtype {inputs_BT.dtype}; "
                f"it needs token ids, int32 (batch, length)."
            )
        if tokens.shape != inputs_BT.shape:
            raise UserError(f"The Tokens have shape {tokens.shape}, the inputs {inputs_BT.shape}; they have to agree.")
        orders = self.config.ngram_orders
        if orders and (ngrams_BTO is None or ngrams_BTO.shape != (*inputs_BT.shape, len(orders))):
            raise UserError(
                f"The decoder embeds n-grams of orders {orders} and got n-gram ids of shape "
                f"{None if ngrams_BTO is None else ngrams_BTO.shape}; it needs {(*inputs_BT.shape, len(orders))}: "
                f"set the data's ngram_orders to the model's."
            )


def empty_cache(config: DecoderConfig, batch: int, slots: int) -> Cache:
    """A Cache of `slots` empty slots for a Decoder of this config."""
    position = jnp.zeros((batch, slots), jnp.int32)
    tokens = Tokens(position=position, document=position + PADDING)
    layers = tuple(_empty_layer(config, layer, batch, slots) for layer in config.pattern)
    return Cache(layers, tokens, jnp.int32(0))


def _empty_layer(config: DecoderConfig, layer: Layer, batch: int, slots: int):
    x, tokens = jax.ShapeDtypeStruct((batch, 1, config.width), config.compute_dtype), Tokens.arange(batch, 1)
    init = mixer(config, layer, None).init_with_output
    (_, entry), _ = jax.eval_shape(lambda x: init(jax.random.key(0), x, tokens, tokens), x)

    def empty(x):
        # All integers in a state are documents.
        whole = jnp.zeros((config.repeats, *x.shape), x.dtype)
        return whole + PADDING if jnp.issubdtype(x.dtype, jnp.integer) else whole

    def of_part(part):
        slotted = isinstance(part, KeyValues)
        return jax.tree.map(lambda x: empty(x).repeat(slots, axis=2) if slotted else empty(x), part)

    return jax.tree.map(of_part, entry, is_leaf=lambda part: isinstance(part, KeyValues))
