"""The mesh, the one table of shardings, and what cannot be spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from striate.lib import layouts
from striate.lib.errors import UserError
from striate.lib.parallel import AllGather, ReorderedScan, Ring, StateScan, ValueColumns
from striate.lib.training import data, partition
from striate.lib.training.partition import MeshConfig


def mesh_of(**axes):
    return partition.make_mesh(MeshConfig(**{"sequence": 1, **axes}))


def boxed(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.mark.smoke
def test_every_axis_of_the_mesh_is_auto():
    # Linen's logical constraints raise on the Explicit axes that jax.make_mesh makes by default.
    mesh = mesh_of(data=2, fsdp=2, sequence=2)
    assert mesh.axis_names == ("data", "fsdp", "sequence", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert mesh.devices.shape == (2, 2, 2, 1)


@pytest.mark.parametrize(
    ("shape", "names", "axes", "on_a_device"),
    [
        ((264, 64), ("vocabulary", "embed"), {"sequence": 8}, (264, 8)),
        ((264, 64), ("vocabulary", "embed"), {"sequence": 4, "tensor": 2}, (132, 16)),
        ((3, 64, 8, 16), ("layers", "embed", "heads", "head_dim"), {"fsdp": 2, "sequence": 4}, (3, 8, 8, 16)),
        ((3, 64, 8), ("layers", "embed", "mlp"), {"data": 2, "sequence": 2, "tensor": 2}, (3, 32, 4)),
        ((63, 8), ("embed", "mlp"), {"sequence": 4, "tensor": 2}, (63, 4)),
        ((6, 7), ("embed", "mlp"), {"fsdp": 2, "sequence": 2, "tensor": 2}, (3, 7)),
        ((8,), (None,), {"sequence": 8}, (8,)),
    ],
    ids=["embedding", "tensor", "fsdp and sequence", "data repeats", "left out", "what divides is kept", "no name"],
)
def test_parameters_are_cut_by_the_mesh_axes_that_divide_them(shape, names, axes, on_a_device):
    assert partition.parameter_shardings(boxed(shape, *names), mesh_of(**axes)).shard_shape(shape) == on_a_device


def test_activations_keep_their_width_whole():
    rules = partition.RULES
    activation = nn.logical_to_mesh_axes(("batch", "length", "embed"), rules)
    assert activation == PartitionSpec(("data", "fsdp"), "sequence", None)
    assert nn.logical_to_mesh_axes(("embed",), rules) == PartitionSpec(("fsdp", "sequence"))


def test_a_batch_lies_on_the_mesh_as_it_was():
    mesh = mesh_of(data=2, sequence=4)
    ids = np.arange(2 * 16, dtype=np.int32).reshape(2, 16)
    put = partition.put(ids, mesh)
    assert put.sharding.shard_shape(put.shape) == (1, 4)
    np.testing.assert_array_equal(np.asarray(put), ids)


def test_layouts_and_strategies_by_name():
    mesh = mesh_of(sequence=8)
    assert partition.layout(MeshConfig(layout="striped", stripe=4)) == layouts.Striped(8, 4)
    assert partition.layout(MeshConfig(layout="zigzag", sequence=4)) == layouts.ZigZag(4)
    assert partition.layout(MeshConfig(layout="contiguous")) == layouts.Contiguous(8)
    assert isinstance(partition.parallel(MeshConfig(strategy="ring"), mesh).attention, Ring)
    assert isinstance(partition.parallel(MeshConfig(strategy="allgather"), mesh).attention, AllGather)
    for config, strategy in ((MeshConfig(), ReorderedScan), (MeshConfig(layout="zigzag"), StateScan)):
        across = partition.parallel(config, mesh)
        assert type(across.recurrence) is strategy and across.recurrence.layout == partition.layout(config)
    assert isinstance(partition.parallel(MeshConfig(recurrence="columns"), mesh).recurrence, ValueColumns)
    assert partition.parallel(MeshConfig(strategy="none"), mesh) is None


@pytest.mark.parametrize(
    ("mesh", "sizes", "words"),
    [
        (MeshConfig(stripe=48), {}, ("384", "256", "multiple")),
        (MeshConfig(layout="zigzag"), {"length": 264}, ("16", "264")),
        (MeshConfig(data=2, sequence=4), {"batch": 3}, ("batch", "3", "data 2", "--data.batch=4")),
        (MeshConfig(tensor=8, sequence=1), {}, ("4 heads", "tensor 8", "--model.heads=8")),
        (MeshConfig(tensor=4, sequence=1), {}, ("2 key/value heads", "tensor 4", "--model.kv-heads=4")),
        (MeshConfig(layout="stripped"), {}, ("stripped", "--mesh.layout=striped")),
        (MeshConfig(strategy="rings", stripe=8), {}, ("rings", "--mesh.strategy=ring")),
        (MeshConfig(strategy="none"), {}, ("8 sequence shards", "--mesh.strategy=ring")),
        (MeshConfig(fsdp=0), {}, ("fsdp", "0", "--mesh.fsdp=1")),
    ],
)
def test_what_cannot_be_spread_is_answered_with_the_remedy(mesh, sizes, words):
    with pytest.raises(UserError) as error:
        partition.check(mesh, **{"batch": 2, "length": 256, "heads": 4, "kv_heads": 2, **sizes})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_too_few_devices_are_counted():
    with pytest.raises(UserError, match=r"data 1 x fsdp 1 x sequence 16 x tensor 1 needs 16 devices .* 8 \(cpu\)"):
        partition.make_mesh(MeshConfig(sequence=16))


def test_the_batch_of_every_mesh_is_the_whole_batch(text_data):
    batch = data.open_source(text_data).batch(0)
    for axes in ({"sequence": 8}, {"data": 2, "sequence": 4}, {"fsdp": 2, "tensor": 4}):
        put = partition.put(batch, mesh_of(**axes))
        np.testing.assert_array_equal(np.asarray(put.tokens.document), batch.tokens.document)
