"""The kernels by the real TPU compiler, for every chip, and around rings of pods that are not here."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import striate
from striate import Tokens, masks, scores
from striate.lib import plan
from striate.lib.decoding.paging import paged_attention
from striate.lib.parallel import Ring

CHIPS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
PODS = ("v5p:4x4x4", "v6e:8x8")
MASKS = {
    "causal": (masks.causal(), scores.plain()),
    "window + sink": (masks.causal() & (masks.window(1023) | masks.sink(4)), scores.plain()),
    "packed": (masks.causal() & masks.same("document"), scores.plain()),
    "prefix": (masks.causal() | masks.prefix(), scores.plain()),
    "softcap": (masks.causal(), scores.softcap(50.0)),
}


def some(topologies, usual, cases) -> list:
    """Pairs of a topology and a case: all cases on the first topology, the usual one on each, the others are slow."""

    def mark(topology, case):
        fast = topology == topologies[0] or case == usual
        return pytest.param(topology, case, id=f"{topology}-{case}", marks=[] if fast else pytest.mark.slow)

    return [mark(topology, case) for topology, case in itertools.product(topologies, cases)]


def arrays(length: int, heads=4, kv_heads=2, width=128, dtype=jnp.bfloat16, spread=None):
    """Shapes of (q, k, v, tokens), cut over the mesh axis "sequence" of `spread`."""
    sharding = NamedSharding(spread, P(None, "sequence")) if spread else None

    def shape(*dimensions, dtype=dtype):
        return jax.ShapeDtypeStruct((1, length, *dimensions), dtype, sharding=sharding)

    field = shape(dtype=jnp.int32)
    return shape(heads, width), shape(kv_heads, width), shape(kv_heads, width), Tokens(field, field, prefix=field)


def both_passes(mask, score, parallel=None, implementation="pallas_tpu"):
    def loss(q, k, v, tokens):
        how = {"implementation": implementation, "parallel": parallel}
        out = striate.attention(q, k, v, mask=mask, score=score, q_tokens=tokens, k_tokens=tokens, **how)
        return out.astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))


@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "name"), some(CHIPS, "packed", MASKS))
def test_both_passes_compile(topology, name):
    compiled = plan.compile_for(topology, both_passes(*MASKS[name]), *arrays(4096))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "name"), some(PODS, "packed", MASKS))
def test_a_ring_over_64_chips_compiles(topology, name):
    mesh = Mesh(np.array(plan.describe(topology)).reshape(-1)[:64], ("sequence",))
    shapes = arrays(64 * 1024, spread=mesh)
    compiled = plan.compile_for(topology, both_passes(*MASKS[name], Ring(mesh)), *shapes)
    assert "collective-permute" in compiled.as_text()


@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "name"), some((*PODS, *CHIPS), "packed", MASKS))
def test_a_fused_ring_compiles(topology, name):
    devices = np.array(plan.describe(topology)).reshape(-1)
    mesh = Mesh(devices[:64], ("sequence",))
    shapes = arrays(len(mesh.devices) * 2048, spread=mesh)
    compiled = plan.compile_for(topology, both_passes(*MASKS[name], Ring(mesh), "pallas_tpu_fused"), *shapes)
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2 and "collective-permute" not in text


@pytest.mark.tpu
@pytest.mark.parametrize(("width", "dtype"), [(64, "bfloat16"), (80, "bfloat16"), (256, "bfloat16"), (128, "float32")])
def test_other_widths_and_float32_compile(width, dtype):
    shapes = arrays(2048, width=width, dtype=jnp.dtype(dtype))
    plan.compile_for("v5p:2x2x1", both_passes(masks.causal(), scores.plain()), *shapes)


@pytest.mark.tpu
@pytest.mark.parametrize("width", [128, 256])
def test_float32_fits_the_smallest_memory(width):
    shapes = arrays(2048, width=width, dtype=jnp.dtype("float32"))
    plan.compile_for("v4:2x2x1", both_passes(masks.causal(), scores.plain()), *shapes)


@pytest.mark.tpu
def test_lists_of_a_million_tokens_fit():
    # 1024 x 1024 blocks are more than the memory of the scalar core holds at a time.
    shapes = arrays(2**20, heads=1, kv_heads=1)
    plan.compile_for("v5p:2x2x1", both_passes(masks.causal(), scores.plain()), *shapes)


@pytest.mark.tpu
def test_a_long_score_fits_the_smallest_memory():
    score = scores.compose(
        scores.temperature(np.ones(4, np.float32)),
        scores.softcap(30.0),
        scores.signed(),
        scores.alibi(np.ones(4, np.float32)),
    )
    plan.compile_for("v4:2x2x1", both_passes(masks.causal(), score), *arrays(4096, kv_heads=4))


@pytest.mark.tpu
def test_what_the_kernels_do_not_take_is_left_to_xla():
    shapes = arrays(1024, dtype=jnp.float16)
    compiled = plan.compile_for("v5p:2x2x1", both_passes(masks.causal(), scores.plain(), implementation=None), *shapes)
    assert "tpu_custom_call" not in compiled.as_text()
    with pytest.raises(NotImplementedError, match="'pallas_tpu' takes bfloat16 and float32, and not float16"):
        plan.compile_for("v5p:2x2x1", both_passes(masks.causal(), scores.plain()), *shapes)


def decode(mask, score, paged=False):
    """One query for each row of a batch, to its cache or to its pages."""
    how = {"mask": mask, "score": score, "implementation": "pallas_tpu"}

    def attend(q, k, v, q_tokens, k_tokens, *table):
        tokens = {"q_tokens": q_tokens, "k_tokens": k_tokens}
        return (paged_attention if paged else striate.attention)(q, k, v, *table, **tokens, **how)

    return attend


def decode_arrays(heads=32, kv_heads=8, width=128, queries=1, dtype=jnp.bfloat16, length=32668, pages=()):
    """Shapes for `decode`; `pages` are (how many, tokens of each)."""
    batch = 4

    def tokens(length):
        field = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        return Tokens(field, field, prefix=field)

    q = jax.ShapeDtypeStruct((batch, queries, heads, width), dtype)
    k = jax.ShapeDtypeStruct((*(pages or (batch, length)), kv_heads, width), dtype)
    table = [jax.ShapeDtypeStruct((batch, length // pages[1]), jnp.int32)] if pages else []
    return q, k, k, tokens(queries), tokens(length), *table


def check_that_nothing_is_copied(topology, function, shapes):
    compiled = plan.compile_for(topology, function, *shapes)
    assert "striate_decode" in compiled.as_text()
    # More than the fast memory of a chip, in which a copy would not be counted.
    cache = sum(x.size * x.dtype.itemsize for x in shapes[1:3])
    assert cache >= 2**27.5 and compiled.memory_analysis().temp_size_in_bytes < cache / 20


@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "name"), some(CHIPS, "packed", MASKS))
def test_decode_compiles_and_copies_no_cache(topology, name):
    check_that_nothing_is_copied(topology, decode(*MASKS[name]), decode_arrays())


@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "pages"), some(CHIPS, (128, 16), [(16, 1), (128, 16)]))
def test_decode_in_pages_compiles_and_copies_no_page(topology, pages):
    page, queries = pages
    shapes = decode_arrays(queries=queries, length=32768, pages=(2**17 // page, page))
    check_that_nothing_is_copied(topology, decode(*MASKS["packed"], paged=True), shapes)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("width", "kv_heads", "queries", "dtype"),
    [
        *((width, 8, 1, "bfloat16") for width in (64, 80, 96, 128, 192, 256)),
        *((width, 8, 1, "float32") for width in (64, 128, 256)),
        *((128, kv_heads, queries, "bfloat16") for kv_heads in (1, 2, 4, 12, 32) for queries in (1, 16)),
        (80, 4, 16, "bfloat16"),
        (128, 4, 16, "float32"),
    ],
)
def test_decode_copies_no_cache_of_other_shapes(width, kv_heads, queries, dtype):
    heads = max(kv_heads, 12 if kv_heads == 12 else 16)
    shapes = decode_arrays(heads, kv_heads, width, queries, jnp.dtype(dtype), length=2**18 // kv_heads // 128 * 128)
    check_that_nothing_is_copied("v5e:2x2", decode(*MASKS["causal"]), shapes)


def recurrence(implementation, **how):
    """Both passes of linear attention."""

    def loss(arrays, tokens):
        out = striate.linear_attention(**arrays, tokens=tokens, implementation=implementation, **how)
        return out.astype(jnp.float32).sum()

    return jax.grad(loss)


def recurrence_arrays(rule, decay, length=4096, heads=2, kv_heads=2, width=128, value_width=128, dtype=jnp.bfloat16):
    """(arrays, tokens) of `recurrence`."""

    def shape(*dimensions, dtype=dtype):
        return jax.ShapeDtypeStruct((1, length, *dimensions), dtype)

    arrays = {
        "q_BTHD": shape(heads, width),
        "k_BTKD": shape(kv_heads, width),
        "v_BTKV": shape(kv_heads, value_width),
    }
    if decay != "none":
        arrays["log_decay"] = shape(kv_heads, *[width] * (decay == "channel"), dtype=jnp.float32)
    if rule == "delta":
        arrays["beta"] = shape(kv_heads, dtype=jnp.float32)
    field = shape(dtype=jnp.int32)
    return arrays, Tokens(field, field)


RECURRENCES = [("sum", False, "none"), ("sum", True, "token"), ("sum", False, "channel"), ("delta", False, "token")]


@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "kind"), some(CHIPS, RECURRENCES[1], RECURRENCES))
def test_the_recurrence_compiles(topology, kind):
    rule, normalise, decay = kind
    # Nothing asked for by name: it is what a TPU gets.
    compiled = plan.compile_for(
        topology, recurrence(None, rule=rule, normalise=normalise), *recurrence_arrays(rule, decay)
    )
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.tpu
@pytest.mark.parametrize(
    "how",
    [
        {"width": 64, "value_width": 64},
        {"width": 80, "value_width": 192},
        {"width": 256, "value_width": 256},
        {"width": 256, "value_width": 256, "dtype": jnp.float32},
        {"heads": 8, "kv_heads": 1, "length": 1000},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", RECURRENCES, ids=str)
def test_recurrences_of_other_shapes_fit_the_smallest_memory(kind, how):
    rule, normalise, decay = kind
    plan.compile_for(
        "v4:2x2x1", recurrence("pallas_tpu", rule=rule, normalise=normalise), *recurrence_arrays(rule, decay, **how)
    )
