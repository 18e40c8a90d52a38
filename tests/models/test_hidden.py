"""What masks of published systems hide no gradient passes: Jacobians of a layer and of a decoder are 0 there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from oracles import papers
from striate.lib.positions import parse
from striate.models.decoder import Decoder, DecoderConfig, Layer
from striate.models.layers import Attention

LENGTH, WIDTH = 24, 16
MASKS = papers.MASKS + papers.PER_HEAD


def reaches(function, x) -> np.ndarray:
    """bool (T, T): whether row i of function(x), (T, E) to (T, E), depends on row j of x, by reverse mode."""
    shape = x.shape
    cotangents = np.random.default_rng(1).normal(size=(LENGTH, *shape)) * np.eye(LENGTH)[:, :, None]
    jacobian = jax.jit(lambda x: jax.vmap(jax.vjp(function, x)[1])(jnp.float32(cotangents))[0])(x)
    assert np.isfinite(jacobian).all()
    return np.asarray(jacobian != 0).any(-1)


def seen(named, tokens) -> np.ndarray:
    """bool (T, T): the pairs that some head sees, and every token itself."""
    visible = named.visible(tokens, tokens)[0]
    return visible.reshape(-1, LENGTH, LENGTH).any(0) | np.eye(LENGTH, dtype=bool)


def problem(named):
    rng = np.random.default_rng(0)
    return named.tokens(rng, 1, LENGTH), jnp.float32(rng.normal(size=(LENGTH, WIDTH))), named.mask.heads or 2


@functools.cache
def layer(named, heads: int):
    return Attention(heads, heads, 4, named.mask, parse("Rope()"), "plain()", 0.5, "float32")


@pytest.mark.long
@pytest.mark.parametrize("named", MASKS, ids=lambda named: named.name)
def test_of_a_layer(named):
    tokens, x, heads = problem(named)
    module = layer(named, heads)
    params = nn.unbox(module.init(jax.random.key(0), x[None], tokens, tokens, None))

    def attend(x):
        return module.apply(params, x[None], tokens, tokens, None)[0][0]

    shown = seen(named, tokens)
    # A row that sees nothing, or only itself, does not depend on its query.
    np.testing.assert_array_equal(reaches(attend, x) & ~np.eye(LENGTH, dtype=bool), shown & ~np.eye(LENGTH, dtype=bool))


@pytest.mark.long
@pytest.mark.parametrize("named", MASKS, ids=lambda named: named.name)
def test_of_a_decoder(named):
    tokens, _, heads = problem(named)
    config = DecoderConfig(
        vocabulary=LENGTH, width=WIDTH, layers=2, heads=heads, kv_heads=heads, head_dim=4, hidden=24,
        pattern=(Layer(mask=named.text),),
    )  # fmt: skip
    model, inputs = Decoder(config), jnp.arange(LENGTH, dtype=jnp.int32)[None]
    ngrams = jnp.zeros((1, LENGTH, 0), jnp.int32)
    params = nn.unbox(model.init(jax.random.key(0), inputs, tokens, ngrams))["params"]

    def hidden(embedding):
        # One row of the table for each token: the gradient of the table is that of the input.
        return model.apply({"params": {**params, "embedding": embedding}}, inputs, tokens, ngrams)[0]

    once = seen(named, tokens).astype(int)
    np.testing.assert_array_equal(reaches(hidden, params["embedding"]), once @ once > 0)


def test_enough_masks_hide_something():
    hiding = [named for named in MASKS if not seen(named, problem(named)[0]).all()]
    assert len(hiding) >= 30
