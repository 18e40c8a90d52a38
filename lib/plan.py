"""Programs for a pod that is not here: the TPU compiler, run ahead of time for a described topology."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from striate.lib.errors import UserError

# Without a TPU libtpu would else complain that it cannot find out the first two. They change no program.
NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@functools.cache
def describe(topology: str) -> tuple[jax.Device, ...]:
    """The devices of a topology such as "v5e:2x2", "v5p:4x4x4" or "tpu7x:2x2x1", to compile for; none of them is there.

    Raises:
      UserError: libtpu is not installed, or it knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f'To compile for {topology} takes the compiler of TPUs, libtpu: pip install "striate[tpu]".')
    if "TPU_SKIP_MDS_QUERY" in os.environ:  # set by jax where it finds no TPU
        os.environ.update({name: value for name, value in NO_TPU.items() if name not in os.environ})
    try:
        return tuple(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2] or error
        raise UserError(f"There is no topology {topology!r}, such as v5p:2x2x1 or v6e:2x2: {reason}") from error


def compile_for(topology: str, function: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    """Compiles a function for a described topology: `.memory_analysis()` then tells what it takes on each device.

    Args:
      topology: chip and extents, such as "v5e:2x2" or "v5p:4x4x4".
      function: one to be jitted, or one already under jax.jit.
      args: trees of jax.ShapeDtypeStruct. Those with a sharding have it on one mesh over all of, or some of,
        `describe(topology)`; those without are replicated on that mesh, or lie on the first device where there is none.

    Raises:
      UserError: libtpu is not installed, or it knows no such topology.

    Example:
      q = jax.ShapeDtypeStruct((1, 8192, 8, 128), jnp.bfloat16)
      compile_for("v5p:2x2x1", attention, q, q, q).memory_analysis().temp_size_in_bytes
    """
    devices = describe(topology)
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(args) if isinstance(leaf.sharding, NamedSharding)]
    mesh = meshes[0] if meshes else Mesh(np.array(devices[:1]), ("device",))
    replicated = NamedSharding(mesh, PartitionSpec())

    def placed(leaf):
        return leaf if leaf.sharding else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells the lowering of kernels which chip it is for
        return jitted.trace(*jax.tree.map(placed, args)).lower(lowering_platforms=("tpu",)).compile()
