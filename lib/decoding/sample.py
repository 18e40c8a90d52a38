"""Generation: the prompt in one call, then one token a step, all in one jitted function."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from striate.lib.decoding.cache import Cache
from striate.lib.errors import UserError
from striate.lib.ngrams import ngram_ids
from striate.lib.text import BOUNDARY
from striate.lib.tokens import PADDING, Tokens
from striate.models.decoder import Decoder, DecoderConfig, empty_cache


def generate(
    config: DecoderConfig, params, prompt_ids, steps: int, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0
) -> np.ndarray:
    """Continues a prompt on one device, until `steps` tokens are drawn or the document ends.

    Args:
      config: of the model; its masks read position and document, the only fields of generated tokens.
      params: the parameters, without flax metadata boxes.
      prompt_ids: the beginning of a document, integers (length,), each a byte; BOUNDARY may stand before them, and is
        put there where it does not.
      steps: the most tokens to draw.
      temperature: divides the logits; 0 takes the most likely token.
      top_p: draws from the smallest set of tokens whose probabilities add up to it.
      seed: of the draws.

    Returns:
      The drawn bytes, int32 (at most `steps`,), without the prompt and without the BOUNDARY that ended them.

    Raises:
      UserError: a prompt that is empty or no vector of ids, settings out of range, or a model that sees later tokens.
    """
    config.check_next_token()
    prompt = _prompt(prompt_ids)
    _check(steps, temperature, top_p)
    # Rounded up, so that prompts and steps of many lengths share one compiled program.
    padded = np.zeros(_power_of_two(len(prompt)), np.int32)
    padded[: len(prompt)] = prompt
    settings = jnp.float32(temperature), jnp.float32(top_p), jax.random.key(seed)
    drawn, count = _continue(config, _power_of_two(steps), params, padded, len(prompt), steps, *settings)
    drawn = np.asarray(drawn)[: int(count)]
    return drawn[drawn != BOUNDARY]


def draw(logits_V: jax.Array, key: jax.Array, temperature, top_p) -> jax.Array:
    """One id, int32 (): from `nucleus` at this temperature, or the most likely one at temperature 0."""
    scaled_V = nucleus(logits_V / jnp.where(temperature > 0, temperature, 1.0), top_p)
    drawn = jax.random.categorical(key, scaled_V)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)


def nucleus(logits_V: jax.Array, top_p) -> jax.Array:
    """The logits of the smallest set whose probabilities add up to `top_p` or more, -inf elsewhere.

    Of equal logits the lower id goes in first. Source: Holtzman et al. 2020, section 3.1.
    """
    order_V = jnp.argsort(-logits_V, stable=True)
    p_V = jax.nn.softmax(logits_V[order_V])
    kept_V = jnp.cumsum(p_V) - p_V < top_p
    return jnp.where(jnp.zeros_like(kept_V).at[order_V].set(kept_V), logits_V, -jnp.inf)


class _State(NamedTuple):
    count: jax.Array  # int32 (), tokens drawn
    drawn: jax.Array  # int32 (steps,), the tokens drawn
    recent: jax.Array  # int32 (1, longest n-gram), the tokens so far, as many as an n-gram reads, the last one last
    logits: jax.Array  # float32 (V,), scores of the token to come
    cache: Cache
    key: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continue(config: DecoderConfig, room: int, params, prompt, length, steps, temperature, top_p, key):
    """(drawn ids (room,), how many): `length` ids of `prompt` are real, `steps` <= `room`."""
    forward = functools.partial(_forward, config, params)
    reach = max(config.ngram_orders, default=1)
    ids, position = prompt[None], jnp.arange(len(prompt), dtype=jnp.int32)[None]
    tokens = Tokens(position=position, document=jnp.where(position < length, 0, PADDING))
    ngrams = ngram_ids(ids, tokens.document, config.ngram_orders, config.ngram_buckets)
    logits, cache = forward(ids, tokens, ngrams, empty_cache(config, 1, len(prompt) + room), length - 1)
    recent = jax.lax.dynamic_slice_in_dim(jnp.pad(ids, ((0, 0), (reach, 0))), length, reach, axis=1)

    def unfinished(state: _State):
        return (state.count < steps) & ((state.count == 0) | (state.drawn[state.count - 1] != BOUNDARY))

    def step(state: _State) -> _State:
        key, now = jax.random.split(state.key)
        token = draw(state.logits, now, temperature, top_p)
        recent = jnp.concatenate([state.recent[:, 1:], token[None, None]], axis=1)
        at = length + state.count
        document = jnp.where(at - jnp.arange(reach)[None, ::-1] >= 0, 0, PADDING)
        ngrams = ngram_ids(recent, document, config.ngram_orders, config.ngram_buckets)[:, -1:]
        tokens = Tokens(position=at[None, None], document=jnp.zeros((1, 1), jnp.int32))
        logits, cache = forward(token[None, None], tokens, ngrams, state.cache, 0)
        return _State(state.count + 1, state.drawn.at[state.count].set(token), recent, logits, cache, key)

    start = _State(jnp.int32(0), jnp.zeros(room, jnp.int32), recent, logits, cache, key)
    end = jax.lax.while_loop(unfinished, step, start)
    return end.drawn, end.count


def _forward(config: DecoderConfig, params, ids, tokens, ngrams, cache, last):
    """(logits (V,) after the token `last`, the cache); ids that stand for nothing are never drawn."""
    decoder, variables = Decoder(config), {"params": params}
    hidden_BTE, cache = decoder.apply(variables, ids, tokens, ngrams, cache)
    logits_V = decoder.apply(variables, hidden_BTE[0, last], method="logits")
    return jnp.where(jnp.arange(config.vocabulary) <= BOUNDARY, logits_V, -jnp.inf), cache


def _prompt(ids) -> np.ndarray:
    """int32 (length,), BOUNDARY first."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"The prompt has shape {ids.shape} and dtype {ids.dtype}; it needs one integer id or more, shape "
            f"(length,): encode a text, or pass [{BOUNDARY}] for a document from its start."
        )
    ids = ids if ids[0] == BOUNDARY else np.concatenate([[BOUNDARY], ids])
    wrong = ids[1:][(ids[1:] < 0) | (ids[1:] >= BOUNDARY)]
    if wrong.size:
        raise UserError(f"The prompt holds the id {wrong[0]}; after the first, ids are bytes, 0 to {BOUNDARY - 1}.")
    return ids.astype(np.int32)


def _check(steps, temperature, top_p) -> None:
    for name, value, works, need in (
        ("steps", steps, steps >= 1, "at least 1"),
        ("temperature", temperature, temperature >= 0, "at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0 and at most 1"),
    ):
        if not works:
            raise UserError(f"{name} is {value}; it has to be {need}.")


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
