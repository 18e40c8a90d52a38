"""The decoder: equal to its float64 truth, blind to what masks hide, and the same in any token order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from oracles import decoder as oracle
from striate.lib import masks
from striate.lib.errors import UserError
from striate.lib.layouts import Striped, ZigZag
from striate.lib.ngrams import ngram_ids
from striate.lib.tokens import Tokens
from striate.models.decoder import Decoder, DecoderConfig, Layer

LENGTH = 32
CONFIG = DecoderConfig(
    width=32,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=8,
    hidden=48,
    pattern=(
        Layer(position="Rope(theta=500.0)"),
        Layer(mask="causal() & same('document') & (window(3) | sink(2))", position="NoPE()"),
    ),
    ngram_orders=(2, 3),
    ngram_buckets=50,
    ngram_width=8,
    implementation="reference",
)
PLAIN = dataclasses.replace(CONFIG, pattern=(Layer(),), layers=2, ngram_orders=(), implementation="xla")
RNG = np.random.default_rng(0)


def example(config=CONFIG, batch=2):
    """(inputs, tokens, n-gram ids): each row holds three documents of different lengths."""
    inputs = RNG.integers(0, 257, (batch, LENGTH)).astype(np.int32)
    lengths = (13, 5, LENGTH - 18)
    document = np.broadcast_to(np.repeat(np.arange(3, dtype=np.int32), lengths), inputs.shape)
    position = np.broadcast_to(np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]), inputs.shape)
    tokens = Tokens(position=position, document=document)
    return inputs, tokens, ngram_ids(inputs, document, config.ngram_orders, config.ngram_buckets)


def parameters(config=CONFIG, seed=0):
    """Random, nowhere 0 or 1, so that each of them has an effect."""
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), *example(config))
    shapes = nn.unbox(boxed)["params"]
    rng = np.random.default_rng(seed)

    def random(path, leaf):
        if path[-1].key == "gain":
            return jnp.float32(rng.uniform(0.5, 1.5, leaf.shape))
        return jnp.float32(rng.normal(0, 0.2, leaf.shape))

    return jax.tree_util.tree_map_with_path(random, shapes)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, batch):
    return Decoder(config).apply({"params": params}, *batch)


def assert_close(got, expected):
    """Equal up to the rounding of sums: 1e-5 of the greatest entry of each array."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), got, expected)


def visible(config, tokens):
    """bool (B, T, S) for every layer."""
    per_place = [np.asarray(masks.parse(layer.mask).dense(tokens, tokens)) for layer in config.pattern]
    return [per_place[number % len(per_place)] for number in range(config.layers)]


@pytest.mark.parametrize(
    "fields", [{}, {"implementation": "xla"}, {"kv_heads": 4, "ngram_orders": ()}, {"kv_heads": 1}], ids=str
)
def test_hidden_states_are_those_of_the_truth(fields):
    config = dataclasses.replace(CONFIG, **fields)
    batch, params = example(config), parameters(config)
    hidden = run(config, params, batch)
    logits = Decoder(config).apply({"params": params}, hidden, method="logits")
    inputs, tokens, ngrams = batch
    for row in range(2):
        tokens_row, seen = jax.tree.map(lambda x, row=row: x[row : row + 1], tokens), visible(config, tokens)
        truth = oracle.hidden_states(params, config, inputs[row], tokens_row, ngrams[row], [x[row] for x in seen])
        np.testing.assert_allclose(hidden[row], truth, atol=2e-5)
        np.testing.assert_allclose(logits[row], truth @ params["embedding"].T, atol=2e-5)


def test_no_gradient_flows_where_masks_hide():
    config = dataclasses.replace(CONFIG, pattern=CONFIG.pattern[1:], layers=2)
    (inputs, tokens, ngrams), params = example(config, batch=1), parameters(config)
    # One row of the table for each token, so that the gradient of the table is the gradient of the input.
    inputs, params["embedding"] = np.arange(LENGTH)[None], params["embedding"][:LENGTH]
    config = dataclasses.replace(config, vocabulary=LENGTH)

    def hidden(embedding):
        return run(config, {**params, "embedding": embedding}, (inputs, tokens, ngrams))[0]

    gradient = np.abs(np.asarray(jax.jacrev(hidden)(params["embedding"]))).max(axis=(1, 3))
    within_a_layer = visible(config, tokens)[0][0] | np.eye(LENGTH, dtype=bool)
    within_two = within_a_layer.astype(int) @ within_a_layer > 0
    assert not within_two.all() and within_two.sum() > within_a_layer.sum()
    np.testing.assert_array_equal(gradient > 0, within_two)
    np.testing.assert_array_equal(gradient[~within_two], 0.0)


def test_a_document_does_not_hear_of_the_others():
    inputs, tokens, ngrams = example()
    other = np.where(tokens.document == 1, (inputs + 1) % 257, inputs)
    changed = other, tokens, ngram_ids(other, tokens.document, CONFIG.ngram_orders, CONFIG.ngram_buckets)
    before, after = (np.asarray(run(CONFIG, parameters(), batch)) for batch in ((inputs, tokens, ngrams), changed))
    same = tokens.document != 1
    np.testing.assert_array_equal(before[same], after[same])
    assert (before[~same] != after[~same]).any(axis=-1).all()


def test_any_token_order_gives_the_same_hidden_states():
    batch, params = example(), parameters()
    natural = run(CONFIG, params, batch)
    for layout in (Striped(8), ZigZag(4)):
        permuted = layout.restore(run(CONFIG, params, layout.permute(batch)))
        np.testing.assert_allclose(permuted, natural, atol=1e-5)
    shuffled = RNG.permutation(LENGTH)
    permuted = run(CONFIG, params, jax.tree.map(lambda x: x[:, shuffled], batch))
    np.testing.assert_allclose(permuted, natural[:, shuffled], atol=1e-5)


def test_remat_saves_memory_and_changes_no_gradient():
    batch, params = jax.tree.map(lambda x: np.concatenate([x] * 16, axis=1), example()), parameters(PLAIN)
    found = {}
    for remat in ("none", "attention", "layer"):
        config = dataclasses.replace(PLAIN, remat=remat)
        gradient = jax.jit(jax.grad(lambda params, batch, config=config: jnp.sin(run(config, params, batch)).sum()))
        compiled = gradient.lower(params, batch).compile()
        found[remat] = compiled(params, batch), compiled.memory_analysis().temp_size_in_bytes
    none, attention, layer = (size for _, size in found.values())
    assert layer < attention < 0.7 * none
    for remat in ("attention", "layer"):
        assert_close(found[remat][0], found["none"][0])


def loops(remat: str) -> int:
    """How many loops the gradient runs: attention is made of them."""
    config = dataclasses.replace(PLAIN, remat=remat)
    gradient = jax.grad(lambda params, batch: run(config, params, batch).sum())
    return str(jax.make_jaxpr(gradient)(parameters(PLAIN), example())).count("while[")


def test_remat_can_spare_attention():
    assert loops("none") == loops("attention") < loops("layer")


def test_half_precision_keeps_float32_parameters():
    config, batch, params = dataclasses.replace(CONFIG, compute_dtype="bfloat16"), example(), parameters()
    hidden = run(config, params, batch)
    logits = Decoder(config).apply({"params": params}, hidden, method="logits")
    drawn = jax.eval_shape(Decoder(config).init, jax.random.key(0), *batch)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(drawn)} == {jnp.dtype("float32")}
    error = np.abs(np.float32(hidden) - run(CONFIG, params, batch))
    assert 0 < error.mean() < 0.03


def test_every_parameter_has_logical_names():
    boxed = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), *example())["params"]
    names = {
        jax.tree_util.keystr(path): tuple(spec)
        for path, spec in jax.tree.leaves_with_path(nn.get_partition_spec(boxed))
    }
    assert names["['embedding']"] == ("vocabulary", "embed")
    assert names["['layers']['layer_1']['attention']['qkv']"] == ("layers", "embed", "kv_heads", None, "head_dim")
    assert names["['layers']['layer_0']['feed_forward']['down']"] == ("layers", "mlp", "embed")
    is_box = dict(is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for box in jax.tree.leaves(boxed, **is_box):
        assert isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.value.ndim


def test_the_first_loss_is_that_of_a_uniform_guess():
    config = DecoderConfig(layers=1, hidden=64, implementation="reference")
    batch = inputs, *_ = example(config)
    params = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), *batch))["params"]
    logits = Decoder(config).apply({"params": params}, run(config, params, batch), method="logits")
    targets = np.roll(inputs, -1, axis=1)
    loss = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1).mean()
    assert abs(loss - np.log(config.vocabulary)) < 0.3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 6, "kv_heads": 4}, r"heads is 6, which is no multiple of kv_heads 4: use 4 or 8\."),
        ({"layers": 3, "pattern": (Layer(), Layer())}, r"layers is 3.* pattern, 2: use 2 or 4\."),
        ({"head_dim": 7}, r"got 7, which is no multiple of 2: use 6 or 8\."),
        ({"pattern": (Layer(position="Rop()"),)}, r"no Rop \(did you mean Rope\?\)"),
        ({"width": 0}, r"width is 0; it has to be at least 1\."),
        ({"pattern": ()}, r"pattern is empty; it needs at least one Layer\(\)\."),
        ({"pattern": (Layer(mask="casual()"),)}, r"'casual', which is no mask \(did you mean 'causal'\?\)"),
        ({"pattern": (Layer(mixer="attentoin"),)}, r"mixer is 'attentoin'; there are 'attention', 'lightning', "),
        ({"remat": "all"}, r"remat is 'all'; there are 'none', 'layer', 'attention'\."),
        ({"compute_dtype": "float16"}, r"compute_dtype is 'float16'; there are 'float32', 'bfloat16'\."),
        ({"ngram_orders": (0,)}, r"ngram_orders is \(0,\); each has to be at least 1\."),
        ({"ngram_orders": (2,), "ngram_width": 0}, r"ngram_width 0; both have to be at least 1"),
    ],
)
def test_a_config_that_cannot_work_says_why(fields, message):
    with pytest.raises(UserError, match=message):
        DecoderConfig(**fields)


def test_inputs_that_do_not_fit_say_why():
    inputs, tokens, ngrams = example()
    params = parameters()
    for batch, message in (
        ((inputs[0], tokens, ngrams), r"inputs of shape \(32,\) and dtype int32; it needs token ids"),
        ((inputs.astype(np.float32), tokens, ngrams), r"dtype float32; it needs token ids, int32 \(batch, length\)"),
        ((inputs[:, :8], tokens, ngrams), r"Tokens have shape \(2, 32\), the inputs \(2, 8\)"),
        ((inputs, tokens, None), r"orders \(2, 3\) and got n-gram ids of shape None; it needs \(2, 32, 2\)"),
    ):
        with pytest.raises(UserError, match=message):
            run(CONFIG, params, batch)
    config = dataclasses.replace(CONFIG, pattern=(Layer(mask="causal() | prefix()"),))
    with pytest.raises(UserError, match="reads the key field 'prefix'"):
        run(config, params, (inputs, tokens, ngrams))
