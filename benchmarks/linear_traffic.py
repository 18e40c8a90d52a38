"""What crosses the links when a linear recurrence runs over 64 chips, read from the compiled program. Needs no TPU.

    striate bench linear-traffic [--topology v5p:4x4x4] [--length 131072 1048576]

One layer forward + backward, 16 heads of 128, values in bfloat16, a decay a token, compiled by the compiler of TPUs
(pip install "striate[tpu]") for StateScan with either exchange, contiguous and zigzag. For every kind of collective:
the bytes that come to a device. Beside it what a ring of keys and values would bring, forward and backward: all other
devices' keys and values, twice, and their gradients in float32.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from striate.lib.layouts import ZigZag
from striate.lib.linear_attention import linear_attention
from striate.lib.parallel import StateScan
from striate.lib.parallel.state_scan import EXCHANGES
from striate.lib.plan import compile_for, describe

HEADS, WIDTH = 16, 128
ORDERS = {"contiguous": None, "zigzag": ZigZag}
KINDS = ("all-gather", "collective-permute", "all-reduce", "reduce-scatter", "all-to-all")
OPERATION = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
ARRAY = re.compile(r"(\w+?)(\d+)\[([\d,]*)\]")


def received(program: str) -> Counter:
    """Bytes that come to a device by each kind of collective, of a compiled program without loops around them."""
    found: Counter = Counter()
    for shapes, kind, start in OPERATION.findall(program):
        arrays = [
            int(bits) // 8 * np.prod([int(n) for n in sizes.split(",") if n])
            for _, bits, sizes in ARRAY.findall(shapes)
        ]
        # What starts gives its operands first, then its results, then flags.
        arrays = [x for x in arrays if x > 4] if start else arrays
        found[kind] += int(sum(arrays[len(arrays) // 2 :] if start and kind != "all-reduce" else arrays))
    return found


def program(topology: str, length: int, layout: type | None, exchange: str) -> str:
    """The compiled layer, forward + backward."""
    mesh = Mesh(np.array(describe(topology)), ("sequence",))
    parallel = StateScan(mesh, layout=layout and layout(mesh.size), exchange=exchange)
    sharding = NamedSharding(mesh, P(None, "sequence"))

    def array(*width, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, length, HEADS, *width), dtype, sharding=sharding)

    def loss(q, k, v, log_decay):
        out = linear_attention(q, k, v, log_decay=log_decay, parallel=parallel, implementation="xla")
        return out.astype(jnp.float32).sum()

    args = array(WIDTH), array(WIDTH), array(WIDTH), array(dtype=jnp.float32)
    return compile_for(topology, jax.grad(loss, (0, 1, 2, 3)), *args).as_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--length", nargs="+", type=int, default=[131_072, 1_048_576], help="tokens")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # so that jax does not look for a TPU
    console, chips = Console(width=120), len(describe(arguments.topology))
    shown = Table("tokens", "order", "exchange", box=None, title=f"{arguments.topology}: MB that come to a device")
    for name in ("MB", "states", "a ring of keys, MB", "by"):
        shown.add_column(name, justify="right")
    state, wide = HEADS * WIDTH * WIDTH * 4, HEADS * 2 * WIDTH
    for length, (order, layout), exchange in itertools.product(arguments.length, ORDERS.items(), EXCHANGES):
        found = received(program(arguments.topology, length, layout, exchange))
        total, ring = sum(found.values()), (chips - 1) * length // chips * wide * (2 + 2 + 4)
        cells = f"{total / 2**20:.1f}", f"{total / state:.1f}", f"{ring / 2**20:,.0f}"
        shown.add_row(
            f"{length:,}", order, exchange, *cells, ", ".join(f"{kind} {found[kind] / 2**20:.1f}" for kind in found)
        )
    console.print(shown)


if __name__ == "__main__":
    main()
