"""Where everything lives: the mesh, the table from logical names to mesh axes, and the shardings that follow."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
from dataclasses import dataclass

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from striate.lib import layouts
from striate.lib.errors import UserError
from striate.lib.parallel import Across, AllGather, ReorderedScan, Ring, StateScan, ValueColumns

AXES = ("data", "fsdp", "sequence", "tensor")

RULES = (
    ("batch", ("data", "fsdp")),
    ("copies", "data"),
    ("length", "sequence"),
    ("vocabulary", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", ("fsdp", "sequence")),
    ("head_dim", None),
    ("layers", None),
    ("ngram", None),
)
"""Logical name -> mesh axes, earlier rules first; a mesh axis is used once per array.

So "embed" spreads parameters and optimiser state over fsdp and sequence together (ZeRO), while activations, whose
"batch" and "length" have taken these axes, keep their width whole on every device.
"""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged, how the sequence is dealt to them, and how attention crosses them."""

    data: int = 1
    """Copies of the parameters, each with its own rows of the batch."""
    fsdp: int = 1
    """Shards of the parameters and of the optimiser state, each with its own rows of the batch."""
    sequence: int = 8
    """Shards of the sequence; parameters and optimiser state are spread over them too."""
    tensor: int = 1
    """Shards of the heads, of the hidden width and of the vocabulary."""
    layout: str = "striped"
    """Order of the tokens over the sequence shards: striped, zigzag or contiguous."""
    stripe: int = 64
    """Tokens of one stripe of the striped layout; 1 is Striped Attention, a kernel's tile keeps empty tiles empty."""
    strategy: str = "ring"
    """How attention crosses the sequence shards: ring, allgather, or none (only for one sequence shard)."""
    recurrence: str = "states"
    """How linear recurrences cross them: states (after an all-to-all where the layout is striped), or columns."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.data, self.fsdp, self.sequence, self.tensor

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def make_mesh(config: MeshConfig) -> Mesh:
    """The one place where a mesh is made: axes AXES, all of them Auto, over the first `config.size` devices.

    On a machine that has no accelerator the devices are simulated, as many as the mesh needs. Joins the other processes
    of the job first, where there are any.

    Raises:
      UserError: too few devices, or some left over in a job of several processes.
    """
    join_processes()
    simulate(config.size)
    devices = jax.devices()
    needed, given = config.size, len(devices)
    if needed > given or (needed < given and jax.process_count() > 1):
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, config.shape, strict=True))
        raise UserError(
            f"The mesh {wanted} needs {needed} devices and there are {given} ({devices[0].platform}): "
            f"set --mesh.sequence or another axis so that their product is {given}{_simulation_remedy(devices)}."
        )
    return jax.make_mesh(config.shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed])


def simulate(count: int) -> None:
    """Asks for `count` devices, should the CPU be what runs; XLA_FLAGS or an earlier use of JAX has precedence."""
    flags = os.environ.get("XLA_FLAGS", "")
    if count == 1 or "xla_force_host_platform_device_count" in flags or jax.distributed.is_initialized():
        return
    # Devices that share a few cores may wait for each other for minutes; XLA takes 40 s for a deadlock and aborts.
    if "xla_cpu_collective_call" not in flags:
        patience = [f"--xla_cpu_collective_call_{end}_timeout_seconds=3600" for end in ("warn_stuck", "terminate")]
        os.environ["XLA_FLAGS"] = " ".join([*patience, flags])
    with contextlib.suppress(RuntimeError):  # the backend has started; make_mesh counts what there is
        jax.config.update("jax_num_cpu_devices", max(count, jax.config.jax_num_cpu_devices))


def join_processes() -> None:
    """Joins the processes of one job (jax.distributed) where the environment says that there are several."""
    environment = os.environ
    pod = any("," in environment.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
    launched = any(int(environment.get(name, 1)) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    named = "JAX_COORDINATOR_ADDRESS" in environment or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    if jax.distributed.is_initialized() or not (pod or launched or named):
        return
    count, index = environment.get("JAX_NUM_PROCESSES"), environment.get("JAX_PROCESS_ID")
    jax.distributed.initialize(num_processes=count and int(count), process_id=index and int(index))


def layout(config: MeshConfig) -> layouts.Layout:
    """The order of the tokens that the config names."""
    known = {
        "striped": lambda: layouts.Striped(config.sequence, config.stripe),
        "zigzag": lambda: layouts.ZigZag(config.sequence),
        "contiguous": lambda: layouts.Contiguous(config.sequence),
    }
    return _named("layout", config.layout, known)()


def parallel(config: MeshConfig, mesh: Mesh):
    """How mixers cross the sequence shards: an Across, or None for one shard that XLA alone takes care of."""
    axes = {"axis": "sequence", "batch": ("data", "fsdp"), "heads": "tensor"}
    attention = _named("strategy", config.strategy, {"ring": Ring, "allgather": AllGather, "none": None})
    states = ReorderedScan if config.layout == "striped" else StateScan
    recurrence = _named("recurrence", config.recurrence, {"states": states, "columns": ValueColumns})
    return attention and Across(attention(mesh, **axes), recurrence(mesh, layout=layout(config), **axes))


def check(mesh: MeshConfig, batch: int, length: int, heads: int, kv_heads: int) -> None:
    """Raises UserError where the mesh does not divide what it is asked to spread."""
    for axis, size in zip(AXES, mesh.shape, strict=True):
        if size < 1:
            raise UserError(f"The mesh axis {axis} has {size} shards and needs at least 1: set --mesh.{axis}=1.")
    if mesh.strategy == "none" and mesh.sequence > 1:
        raise UserError(
            f"Attention over {mesh.sequence} sequence shards needs a strategy and got none: "
            "set --mesh.strategy=ring, or --mesh.sequence=1."
        )
    _named("strategy", mesh.strategy, ("ring", "allgather", "none"))
    _named("recurrence", mesh.recurrence, ("states", "columns"))
    layout(mesh).check(length)
    rows = mesh.data * mesh.fsdp
    _divides(rows, batch, f"the batch of {batch} rows", f"data {mesh.data} x fsdp {mesh.fsdp}", "--data.batch")
    _divides(mesh.tensor, heads, f"the {heads} heads", f"tensor {mesh.tensor}", "--model.heads")
    _divides(mesh.tensor, kv_heads, f"the {kv_heads} key/value heads", f"tensor {mesh.tensor}", "--model.kv-heads")


def parameter_shardings(tree, mesh: Mesh):
    """Shardings for a tree whose leaves may carry logical names (flax metadata boxes); the rest is replicated.

    A mesh axis that does not divide its dimension is left out: the dimension then stays whole.

    Args:
      tree: shapes and dtypes, as jax.eval_shape gives them.

    Returns:
      The same tree without the boxes, a NamedSharding per array.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(tree), RULES)
    return jax.tree.map(lambda leaf, spec: NamedSharding(mesh, _degrade(leaf.shape, spec, mesh)), nn.unbox(tree), specs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For every array (batch, length, ...) of a batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put(batch, mesh: Mesh):
    """The whole job's batch, known to every process, onto the mesh: each hands over only what its devices hold."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x), x.shape), batch)


def _degrade(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """`spec` without the mesh axes that do not divide their dimension."""
    kept = []
    for size, axes in zip(shape, spec, strict=False):
        chosen = ()
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if size % (math.prod(mesh.shape[a] for a in chosen) * mesh.shape[axis]) == 0:
                chosen += (axis,)
        kept.append(chosen or None)
    return PartitionSpec(*kept)


def _divides(shards: int, size: int, what: str, how: str, flag: str) -> None:
    if size % shards:
        up = size + shards - size % shards
        raise UserError(f"{what[0].upper()}{what[1:]} cannot be spread over {how}: set {flag}={up}, or fewer shards.")


def _named(kind: str, name: str, known):
    """The entry `name` of `known`, or a UserError with the nearest name."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1) or list(known)[:1]
        raise UserError(f"There is no {kind} {name!r}; known are {', '.join(known)}: set --mesh.{kind}={near[0]}.")
    return known[name] if isinstance(known, dict) else name


def _simulation_remedy(devices) -> str:
    """What else helps against too few devices."""
    if devices[0].platform == "cpu":
        return ", or make the mesh before any other use of JAX, which fixes how many devices are simulated"
    return ", or simulate the devices with JAX_PLATFORMS=cpu"
