"""Which TPU a program is for: the one it is compiled for, be it here or only described."""

from __future__ import annotations

import jax

LANES = 128

# What JAX calls the chips, and what everybody else does.
NAMES = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}


def target() -> str | None:
    """The chip for which a program is traced: "v4" to "tpu7x" (NAMES), or what JAX calls it; None for no TPU.

    Where a mesh was set (`jax.sharding.use_abstract_mesh`, jax.shard_map) it says, which serves to compile ahead of
    time on a machine without a TPU; else the default device.
    """
    device = _device()
    kind = device.device_kind
    return NAMES.get(kind, kind) if device.platform == "tpu" else None


def vmem() -> int:
    """Bytes of fast memory that a kernel may take on that chip."""
    return (16 if target() == "v4" else 64) * 2**20


def cores() -> int:
    """How many tensor cores are one device: 2 on v5p, as described topologies have it, where v4 gives each its own."""
    return _device().num_cores or 1


def _device():
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
