"""Programs for a pod that is not here: the compilers of TPUs and GPUs, run ahead of time for a described topology."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from striate.lib.errors import UserError
from striate.pallas_kernels.gpu import chips as gpu

# Without a TPU libtpu would else complain that it cannot find out the first two. They change no program.
NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

# TPUs are left to libtpu, which knows more of them with every version.
KNOWN = re.compile(rf"(v\d|tpu).*|({'|'.join(gpu.CHIPS)}):([1-9]\d*x)?[1-9]\d*")

# What XLA asks about a GPU; what is the same for all of them stands here as numbers.
TARGET = """
gpu_device_info {{
  name: "{kind}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  core_count: {multiprocessors}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: {cache}
  shared_memory_per_core: {shared_memory}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {block_memory}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""


@functools.cache
def describe(topology: str) -> tuple[jax.Device, ...]:
    """The devices of a topology, to compile for; none of them is there.

    Args:
      topology: a TPU and the extents of its slice, such as "v5e:2x2", "v5p:4x4x4" or "tpu7x:2x2x1"; or GPUs of one
        host, such as "h200:8", or of several, such as "h200:4x8".

    Raises:
      UserError: the compiler for it is not installed, or it knows no such topology.
    """
    unknown = f"There is no topology {topology!r}, such as v5p:2x2x1, v6e:2x2, h200:8 or a100:2x8"
    if not KNOWN.fullmatch(topology):
        raise UserError(f"{unknown}. GPUs that are known: {', '.join(gpu.CHIPS)}.")
    name, _, extents = topology.partition(":")
    if name in gpu.CHIPS:
        return _describe_gpus(gpu.CHIPS[name], extents)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f'To compile for {topology} takes the compiler of TPUs, libtpu: pip install "striate[tpu]".')
    if "TPU_SKIP_MDS_QUERY" in os.environ:  # set by jax where it finds no TPU
        os.environ.update({name: value for name, value in NO_TPU.items() if name not in os.environ})
    try:
        return tuple(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2] or error
        raise UserError(f"{unknown}: {reason}") from error


def _describe_gpus(chip: gpu.Chip, extents: str) -> tuple[jax.Device, ...]:
    version = next((n for n in (13, 12) if importlib.util.find_spec(f"jax_cuda{n}_plugin")), None)
    if version is None:
        raise UserError(
            f'To compile for {chip.kind} takes the compiler of GPUs: pip install "striate[gpu-compiler]", or, where '
            'there is a GPU, "striate[cuda]".'
        )
    # The plugin looks for libraries that run programs, which a machine that only compiles them need not have.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    target = TARGET.format(
        major=chip.capability[0],
        minor=chip.capability[2],
        features="feature_extension: ACCELERATED_FEATURES" if chip.capability == "9.0" else "",
        block_memory=chip.shared_memory - 1024,
        **chip._asdict(),
    )
    topology = f"1x{extents}" if "x" in extents else f"1x1x{extents}"
    how = {"platform": "cuda", "target_config": target, "topology": topology}
    try:
        return tuple(topologies.get_topology_desc(**how).devices)
    except NotImplementedError:  # JAX asked the plugin before the check was skipped, for its own devices
        importlib.import_module(f"jax_plugins.xla_cuda{version}").initialize()
        return tuple(topologies.get_topology_desc(**how).devices)


def compile_for(topology: str, function: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    """Compiles a function for a described topology: `.memory_analysis()` then tells what it takes on each device.

    Args:
      topology: as of `describe`: "v5e:2x2", "v5p:4x4x4", "h200:8".
      function: one to be jitted, or one already under jax.jit.
      args: trees of jax.ShapeDtypeStruct. Those with a sharding have it on one mesh over all of, or some of,
        `describe(topology)`; those without are replicated on that mesh, or lie on the first device where there is none.

    Raises:
      UserError: the compiler for it is not installed, or it knows no such topology.

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

    platform = "cuda" if devices[0].platform == "gpu" else "tpu"
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells the lowering of kernels which chip it is for
        return jitted.trace(*jax.tree.map(placed, args)).lower(lowering_platforms=(platform,)).compile()
