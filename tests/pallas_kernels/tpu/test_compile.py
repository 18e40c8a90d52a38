"""The kernels by the real TPU compiler, for every chip, and around rings of pods that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import striate
from striate import Tokens, masks, scores
from striate.lib import plan
from striate.lib.parallel import Ring

CHIPS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
MASKS = {
    "causal": (masks.causal(), scores.plain()),
    "window + sink": (masks.causal() & (masks.window(1023) | masks.sink(4)), scores.plain()),
    "packed": (masks.causal() & masks.same("document"), scores.plain()),
    "prefix": (masks.causal() | masks.prefix(), scores.plain()),
    "softcap": (masks.causal(), scores.softcap(50.0)),
}


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
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("topology", CHIPS)
def test_both_passes_compile(topology, name):
    compiled = plan.compile_for(topology, both_passes(*MASKS[name]), *arrays(4096))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.tpu
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v6e:8x8"])
def test_a_ring_over_64_chips_compiles(topology, name):
    mesh = Mesh(np.array(plan.describe(topology)).reshape(-1)[:64], ("sequence",))
    shapes = arrays(64 * 1024, spread=mesh)
    compiled = plan.compile_for(topology, both_passes(*MASKS[name], Ring(mesh)), *shapes)
    assert "collective-permute" in compiled.as_text()


@pytest.mark.tpu
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("topology", [*CHIPS, "v5p:4x4x4", "v6e:8x8"])
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
