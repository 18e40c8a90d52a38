"""Temporary memory of attention on TPUs, forward and backward, as their compiler counts it; no TPU is needed.

The ratio is to what has to be there anyway: the arguments (q, k, v, the cotangent, Tokens), the results (out and the
three gradients) and lse, which is saved in between. Arrays lie in the order that the compiler asks for, as those do
that come out of a model's projections; with --given they lie in the order of their axes, and are copied first.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import striate
from striate import Tokens, masks
from striate.lib import plan
from striate.lib.parallel import Ring

MASK = masks.causal() & masks.same("document")
WIDTH = 128


class Case(NamedTuple):
    topology: str
    devices: int
    length: int
    heads: int
    kv_heads: int


CASES = (
    Case("v5p:2x2x1", 1, 2**17, 8, 8),
    Case("v5p:2x2x1", 1, 2**17, 16, 4),
    Case("v5p:4x4x4", 64, 2**20, 32, 8),
    Case("v5p:4x4x4", 64, 2**20, 16, 16),
)


class Memory(NamedTuple):
    """Bytes of one device."""

    needed: int  # arguments, results and what is saved in between
    temporary: int


def measure(case: Case, given: bool = False) -> Memory:
    """Compiles attention and its gradients for a topology."""
    mesh = Mesh(np.array(plan.describe(case.topology)).reshape(-1)[: case.devices], ("sequence",))
    parallel = Ring(mesh) if case.devices > 1 else None

    def shape(*dimensions, dtype=jnp.bfloat16):
        sharding = NamedSharding(mesh, P(None, "sequence"))
        return jax.ShapeDtypeStruct((1, case.length, *dimensions), dtype, sharding=sharding)

    def both_passes(q, k, v, tokens, d_out):
        def attend(q, k, v):
            return striate.attention(q, k, v, mask=MASK, q_tokens=tokens, k_tokens=tokens, parallel=parallel)

        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(d_out)

    chosen = {} if given else {"in_shardings": Format(Layout.AUTO), "out_shardings": Format(Layout.AUTO)}
    q, k, field = shape(case.heads, WIDTH), shape(case.kv_heads, WIDTH), shape(dtype=jnp.int32)
    jitted = jax.jit(both_passes, **chosen)
    memory = plan.compile_for(case.topology, jitted, q, k, k, Tokens(field, field), q).memory_analysis()
    lse = case.length // case.devices * case.heads * 4
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + lse
    return Memory(needed, memory.temp_size_in_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--given", action="store_true", help="arrays lie in the order of their axes")
    given = parser.parse_args().given
    print("topology    devices    tokens  heads  needed MB  temporary MB  ratio")
    for case in CASES:
        needed, temporary = measure(case, given)
        heads = f"{case.heads}/{case.kv_heads}"
        print(
            f"{case.topology:11} {case.devices:7} {case.length:9,} {heads:>6} {needed / 2**20:10.0f} "
            f"{temporary / 2**20:13.0f} {temporary / needed:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
