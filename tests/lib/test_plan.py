"""Compiling for pods that are not here."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from striate.lib import plan
from striate.lib.errors import UserError

MIB = 1 << 20


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plan.describe.cache_clear()
    with pytest.raises(UserError, match=r'v5p:2x2x1 .*pip install "striate\[tpu\]"'):
        plan.compile_for("v5p:2x2x1", jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32))


def test_without_the_compiler_of_gpus_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plan.describe.cache_clear()
    with pytest.raises(UserError, match=r'NVIDIA A100.*pip install "striate\[gpu-compiler\]"'):
        plan.compile_for("a100:2x8", jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32))


@pytest.mark.parametrize("topology", ["h900:8", "h200", "h200:x", "h200:0", "h200:2x", "gpu:8", "8", ""])
def test_what_names_neither_a_tpu_nor_known_gpus_is_refused_whatever_is_installed(topology):
    with pytest.raises(UserError, match=f"no topology '{topology}', such as .* known: a100, h100, h200"):
        plan.describe(topology)


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v9:2x2", "v5p", "v4:3x1"])
def test_an_unknown_topology_is_refused(topology):
    with pytest.raises(UserError, match=f"'{topology}'"):
        plan.describe(topology)


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_what_has_no_sharding_lies_on_one_device(topology):
    given = {"a": jax.ShapeDtypeStruct((1024, 1024), jnp.float32), "b": jax.ShapeDtypeStruct((1024,), jnp.float32)}
    compiled = plan.compile_for(topology, lambda tree: tree["a"] @ tree["b"], given)
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == 4 * MIB + 4096
    assert compiled.output_shardings.device_set == {plan.describe(topology)[0]}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("topology", "count", "kind"),
    [("h200:8", 8, "NVIDIA H200"), ("h100:2x4", 8, "NVIDIA H100 80GB HBM3"), ("a100:1", 1, "NVIDIA A100-SXM4-80GB")],
)
def test_gpus_are_described_by_hosts_and_gpus_of_each(topology, count, kind):
    devices = plan.describe(topology)
    assert len(devices) == count and {device.device_kind for device in devices} == {kind}


@pytest.mark.parametrize(
    "topology",
    [
        pytest.param("v5p:4x4x4", marks=pytest.mark.tpu),
        pytest.param("h200:8", marks=pytest.mark.gpu),
        pytest.param("h100:2x4", marks=pytest.mark.gpu),
    ],
)
def test_a_sum_over_a_pod_is_compiled_with_its_collective_and_its_memory(topology):
    mesh = Mesh(np.array(plan.describe(topology)), ("shard",))

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P("shard"), P()), out_specs=P())
    def total(x, scale):
        return jax.lax.psum(x * scale, "shard")

    x = jax.ShapeDtypeStruct((mesh.size, MIB), jnp.float32, sharding=NamedSharding(mesh, P("shard")))
    compiled = plan.compile_for(topology, total, x, jax.ShapeDtypeStruct((), jnp.float32))
    assert "all-reduce" in compiled.as_text()
    memory = compiled.memory_analysis()
    assert 4 * MIB <= memory.argument_size_in_bytes < 5 * MIB  # a row of x, and the scale
    assert memory.output_size_in_bytes == 4 * MIB
