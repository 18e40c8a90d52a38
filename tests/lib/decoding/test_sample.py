"""Generation: what is drawn, from which set, and that the loop in one program equals the naive one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from striate.lib.decoding.sample import draw, generate, nucleus
from striate.lib.errors import UserError
from striate.lib.ngrams import ngram_ids
from striate.lib.text import BOUNDARY, encode
from striate.lib.tokens import Tokens
from striate.models.decoder import Decoder, DecoderConfig, Layer

CONFIG = DecoderConfig(
    width=32,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=16,
    hidden=48,
    pattern=(Layer(), Layer(mask="causal() & (window(5) | sink(2))")),
    ngram_orders=(2, 4),
    ngram_buckets=50,
    ngram_width=8,
)
PROMPT = encode("def f(")


def parameters(seed=0):
    """Random and large, so that the likely continuations vary; the BOUNDARY is drawn now and then."""
    batch = np.zeros((1, 4), np.int32), Tokens.arange(1, 4), np.zeros((1, 4, 2), np.int32)
    shapes = nn.unbox(jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), *batch))["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: jnp.float32(rng.normal(0, 0.5, leaf.shape)), shapes)
    return {**params, "embedding": params["embedding"].at[BOUNDARY].mul(2)}


@functools.partial(jax.jit, static_argnums=2)
def forward(params, inputs, config=CONFIG):
    tokens = Tokens.arange(*inputs.shape)
    ngrams = ngram_ids(inputs, tokens.document, config.ngram_orders, config.ngram_buckets)
    hidden = Decoder(config).apply({"params": params}, inputs, tokens, ngrams)
    return Decoder(config).apply({"params": params}, hidden, method="logits")


def naive_logits(params, ids):
    """Scores (V,) of the token after `ids`, by a forward pass over all of them; the rest of the row is not seen."""
    inputs = np.zeros((1, 32), np.int32)
    inputs[0, : len(ids)] = ids
    logits = np.array(forward(params, inputs)[0, len(ids) - 1])
    logits[BOUNDARY + 1 :] = -np.inf
    return logits


def naive_greedy(params, prompt, steps):
    ids = [BOUNDARY, *prompt]
    for _ in range(steps):
        ids.append(int(naive_logits(params, ids).argmax()))
    return ids[len(prompt) + 1 :]


def test_greedy_is_the_most_likely_continuation_and_repeats():
    params = parameters()
    expected = naive_greedy(params, PROMPT, 12)
    assert len(set(expected)) > 5 and BOUNDARY not in expected
    for seed in (0, 1):
        drawn = generate(CONFIG, params, PROMPT, steps=12, temperature=0, seed=seed)
        assert drawn.dtype == np.int32 and drawn.tolist() == expected


def test_the_end_of_the_document_ends_the_generation():
    endings = []
    for seed in range(8):
        expected = naive_greedy(parameters(seed), PROMPT, 12)
        end = expected.index(BOUNDARY) if BOUNDARY in expected else 12
        drawn = generate(CONFIG, parameters(seed), PROMPT, steps=12, temperature=0)
        assert drawn.tolist() == expected[:end]
        endings.append(end)
    assert min(endings) < 12


def test_a_boundary_before_the_prompt_is_understood():
    params = parameters()
    with_boundary = np.concatenate([[BOUNDARY], PROMPT])
    settings = dict(steps=8, temperature=0)
    np.testing.assert_array_equal(
        generate(CONFIG, params, with_boundary, **settings), generate(CONFIG, params, PROMPT, **settings)
    )


def test_the_seed_decides_what_is_drawn():
    drawn = [generate(CONFIG, parameters(), PROMPT, steps=12, temperature=2.0, seed=seed) for seed in (0, 1, 0)]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert drawn[0].tolist() != drawn[1].tolist()


def set_of_mass(logits, top_p):
    """Probabilities after cutting to the smallest set of mass >= top_p: the sets are tried by size."""
    p = np.exp(np.float64(logits) - np.max(logits))
    p /= p.sum()
    by_size = sorted(range(len(p)), key=lambda i: (-p[i], i))
    for size in range(1, len(p) + 1):
        if p[by_size[:size]].sum() >= top_p or size == len(p):
            kept = np.isin(np.arange(len(p)), by_size[:size])
            return np.where(kept, p, 0) / p[kept].sum()


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.95, 1.0])
def test_the_nucleus_is_the_smallest_set_with_the_mass(top_p):
    rng = np.random.default_rng(0)
    for logits in (*rng.normal(0, 2, (20, 37)), np.zeros(37), np.repeat(rng.normal(size=6), 6)):
        logits = np.float32(logits)
        kept = np.asarray(nucleus(logits, top_p))
        np.testing.assert_array_equal(np.isfinite(kept), set_of_mass(logits, top_p) > 0)
        np.testing.assert_array_equal(kept[np.isfinite(kept)], logits[np.isfinite(kept)])


def test_draws_follow_the_probabilities_in_the_nucleus():
    logits = np.float32(np.random.default_rng(0).normal(0, 2, 37))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(lambda key: draw(logits, key, 0.7, 0.9)))(keys)
    p = set_of_mass(logits / 0.7, 0.9)
    deviation = np.sqrt(p * (1 - p) / len(keys))
    assert (np.abs(np.bincount(drawn, minlength=37) / len(keys) - p) <= 4 * deviation).all()


def test_temperature_zero_takes_the_most_likely():
    logits = jnp.array([0.1, 3.0, 2.9])
    keys = jax.random.split(jax.random.key(0), 50)
    assert {int(draw(logits, key, 0.0, 1.0)) for key in keys} == {1}
    assert {int(draw(logits, key, 1.0, 1.0)) for key in keys} >= {1, 2}


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (np.zeros(0, np.int32), {}, r"shape \(0,\) and dtype int32; it needs one integer id or more"),
        (np.zeros((1, 4), np.int32), {}, r"shape \(1, 4\).* encode a text, or pass \[256\]"),
        (np.zeros(4), {}, "dtype float64"),
        (np.array([1, 256]), {}, r"holds the id 256; after the first, ids are bytes, 0 to 255\."),
        (np.array([1, -3]), {}, "holds the id -3"),
        (PROMPT, {"steps": 0}, r"steps is 0; it has to be at least 1\."),
        (PROMPT, {"temperature": -1.0}, r"temperature is -1.0; it has to be at least 0\."),
        (PROMPT, {"top_p": 0.0}, r"top_p is 0.0; it has to be more than 0 and at most 1\."),
    ],
)
def test_input_that_cannot_work_says_why(prompt, settings, message):
    with pytest.raises(UserError, match=message):
        generate(CONFIG, {}, prompt, **{"steps": 4, **settings})
