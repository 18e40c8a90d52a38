"""Which GPU a program is for: the one it is compiled for, be it here or only described."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """A GPU with the figures of its data sheet that a compiler asks for."""

    kind: str  # what JAX calls it
    capability: str  # for computing, "major.minor"
    multiprocessors: int
    clock: float  # GHz
    memory: int  # bytes
    bandwidth: float  # bytes a second
    shared_memory: int  # bytes of a multiprocessor
    cache: int  # bytes, of the second level


CHIPS = {
    "a100": Chip("NVIDIA A100-SXM4-80GB", "8.0", 108, 1.41, 80 << 30, 2.039e12, 164 << 10, 40 << 20),
    "h100": Chip("NVIDIA H100 80GB HBM3", "9.0", 132, 1.98, 80 << 30, 3.35e12, 228 << 10, 50 << 20),
    "h200": Chip("NVIDIA H200", "9.0", 132, 1.98, 141 << 30, 4.8e12, 228 << 10, 50 << 20),
}


def capability() -> str | None:
    """Compute capability of the GPU for which a program is traced, such as "9.0"; None for no GPU.

    Where a mesh was set (`jax.sharding.use_abstract_mesh`, jax.shard_map) it says, which serves to compile ahead of
    time on a machine without a GPU; else the default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    described = {chip.kind: chip.capability for chip in CHIPS.values()}
    return getattr(device, "compute_capability", None) or described.get(device.device_kind)
