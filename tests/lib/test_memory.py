"""Memory, as the compiler counts it: linear in the length, and under a ring no more with more devices."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import striate
from striate import Tokens, masks
from striate.lib.parallel import Across, AllGather, Ring
from striate.models.decoder import Decoder, DecoderConfig

MASK = masks.causal() & masks.same("document")


def mesh(shards: int) -> jax.sharding.Mesh:
    return jax.make_mesh((shards,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:shards])


def temporary_bytes(function, *arguments) -> int:
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def attention_bytes(length: int, parallel=None, **options) -> int:
    """Of one device, for results and gradients of attention."""
    placed = {"sharding": NamedSharding(parallel.mesh, P(None, "sequence"))} if parallel else {}
    q = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32, **placed)
    k = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32, **placed)
    position = jax.ShapeDtypeStruct((1, length), jnp.int32, **placed)

    def results_and_gradients(q, k, v, position, d_out):
        def attend(q, k, v):
            tokens = Tokens(position=position)
            return striate.attention(q, k, v, mask=MASK, q_tokens=tokens, parallel=parallel, **options)

        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(d_out)

    return temporary_bytes(results_and_gradients, q, k, k, position, q)


def layer_bytes(parallel, length: int) -> int:
    """Of one device, for the gradients of a decoder of one layer."""
    config = DecoderConfig(layers=1)
    model = Decoder(config, Across(parallel))
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32), Tokens.arange(1, 8))
    everywhere, spread = (NamedSharding(parallel.mesh, spec) for spec in (P(), P(None, "sequence")))
    parameters = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), nn.meta.unbox(shapes)
    )
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=spread)
    d_hidden = jax.ShapeDtypeStruct((1, length, config.width), jnp.float32, sharding=spread)

    def gradients(parameters, ids, position, d_hidden):
        _, pull = jax.vjp(lambda p: model.apply(p, ids, Tokens(position=position)), parameters)
        return pull(d_hidden)

    with jax.set_mesh(parallel.mesh):
        return temporary_bytes(gradients, parameters, ids, ids, d_hidden)


def test_on_one_device_it_is_linear_in_the_length():
    assert attention_bytes(8192, implementation="xla") < 4.4 * attention_bytes(2048, implementation="xla")
    assert attention_bytes(8192, implementation="reference") > 15 * attention_bytes(2048, implementation="reference")


@pytest.mark.long
def test_a_layer_under_a_ring_does_not_grow_with_the_devices():
    two, eight = (layer_bytes(Ring(mesh(shards)), 512 * shards) for shards in (2, 8))
    assert eight < 1.1 * two
    assert layer_bytes(AllGather(mesh(8)), 512 * 8) > 1.2 * two


def test_attention_under_a_ring_does_not_grow_with_the_devices():
    # Two devices are less than any ring: what arrives is the last block, and none is under way meanwhile.
    four, eight = (attention_bytes(512 * shards, Ring(mesh(shards))) for shards in (4, 8))
    assert eight < 1.01 * four
    gathered = [attention_bytes(512 * shards, AllGather(mesh(shards))) for shards in (4, 8)]
    assert gathered[1] > 1.5 * gathered[0]


def test_a_share_of_the_heads_at_a_time_takes_less():
    at_once, halves = (attention_bytes(4096, Ring(mesh(4), rounds=rounds)) for rounds in (1, 2))
    assert halves < 0.75 * at_once
