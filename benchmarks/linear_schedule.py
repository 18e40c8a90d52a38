"""The linear recurrence on TPUs: our kernel by its machine schedule, and the xla form by the compiler's estimate.

    striate bench linear-schedule [--json FILE]
    python benchmarks/linear_schedule.py [--chip v5p v6e] [--chunk 128 256] [--width 128] [--json FILE]

Needs no TPU, but the compiler of TPUs: pip install "striate[tpu]". Heads so wide in keys and values, in bfloat16, under
the sum rule with packed documents.

A bundle is what a core issues in one cycle if nothing stalls; they are counted for a block of chunks and divided by its
tokens. "limit" are the cycles that the matrix units take at their peak rate for what the chunk algorithm multiplies:
for a token and a head C (D + V) + 2 D V multiply-adds forward, C (3 D + 2 V) + 4 D V backward, blocks above the
diagonal included, heads not padded. "copies" are the cycles in which what a pass reads and writes comes from and goes
to HBM at its full bandwidth, a chip's cores sharing it. The longest of the three is what such a pass cannot beat.

Of the xla form there is the compiler's cost analysis of both passes, which counts what a loop holds once, and is hence
taken of a batch of sequences that are one chunk each: operations, and bytes that it moves, for a token and a head, and
the cycles that these bytes take at the full bandwidth. They are estimates, of another kind than a schedule.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from tpu_schedule import CHIPS, PASSES, versions

from striate import Tokens
from striate.lib.analysis.tpu_schedule import schedule_for
from striate.lib.linear_attention import CHUNK, linear_attention
from striate.lib.recurrence import State
from striate.pallas_kernels.tpu import linear

HEADS, LENGTH = 2, 8192
DECAYS = ("none", "token")
# From the data sheets: cycles a second, and bytes a second that HBM moves for one core.
CLOCK = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "tpu7x": 2.2e9}
BANDWIDTH = {"v4": 1228e9 / 2, "v5e": 819e9, "v5p": 2765e9 / 2, "v6e": 1640e9, "tpu7x": 3690e9}


class Figure(NamedTuple):
    """Of one token of one head, in cycles; `chunk` in tokens."""

    chip: str
    decay: str
    direction: str
    chunk: int
    bundles: float
    bundles_of_chunk: float
    bound: float
    limit: float
    copies: float


class Estimate(NamedTuple):
    """Of the xla form, both passes, for one token of one head: what the compiler's cost analysis says."""

    chip: str
    decay: str
    flops: float
    bytes: float
    copies: float


def program(implementation: str, decay: str, chunk: int, width: int, length: int = LENGTH):
    """(forward pass, both passes, shapes that they take)."""

    def shape(*dimensions, dtype):
        return jax.ShapeDtypeStruct((LENGTH // length, length, *dimensions), dtype)

    q, document = shape(HEADS, width, dtype=jnp.bfloat16), shape(dtype=jnp.int32)
    arrays = {"q_BTHD": q, "k_BTKD": q, "v_BTKV": q}
    if decay == "token":
        arrays["log_decay"] = shape(HEADS, dtype=jnp.float32)

    def forward(arrays, document, state):
        how = {"tokens": Tokens(document, document), "initial_state": state, "return_state": True}
        return linear_attention(**arrays, **how, chunk=chunk, implementation=implementation)

    def both(arrays, document, state):
        def loss(arrays, state):
            out, state = forward(arrays, document, state)
            return (out.astype(jnp.float32) ** 2).sum() + (state.memory**2).sum()

        return jax.grad(loss, (0, 1), allow_int=True)(arrays, state)

    return forward, both, (arrays, document, jax.eval_shape(State.empty, q, q))


def measure(chip: str, decay: str, chunk: int, width: int) -> Iterator[Figure]:
    """Both passes of our kernel."""
    forward, both, shapes = program("pallas_tpu", decay, chunk, width)
    for direction, function in zip(PASSES, (forward, both), strict=True):
        _, kernels = schedule_for(CHIPS[chip].topology, function, *shapes)
        (kernel,) = (kernel for kernel in kernels if f"striate_linear_{direction}" in kernel.name)
        tokens = max(1, linear.BLOCK // (chunk * width * 2)) * chunk
        bundles = sum(block.bundles for block in kernel.matrix_blocks) / tokens
        bound = sum(block.bound for block in kernel.matrix_blocks) / tokens
        wide = {"forward": 2 * chunk + 2 * width, "backward": 5 * chunk + 4 * width}[direction]
        moved = {"forward": 4, "backward": 7}[direction] * 2 * width + 4 * width**2 / tokens
        limit, copies = wide * width / CHIPS[chip].rate, moved * CLOCK[chip] / BANDWIDTH[chip]
        yield Figure(chip, decay, direction, chunk, bundles, bundles * chunk, bound, limit, copies)


def estimate(chip: str, decay: str, width: int) -> Estimate:
    chunk = CHUNK["plain"]
    _, both, shapes = program("xla", decay, chunk, width, chunk)
    compiled, _ = schedule_for(CHIPS[chip].topology, both, *shapes)
    found = compiled.cost_analysis()
    flops, moved = (found[name] / (LENGTH * HEADS) for name in ("flops", "bytes accessed"))
    return Estimate(chip, decay, flops, moved, moved * CLOCK[chip] / BANDWIDTH[chip])


def table(figures: list[Figure]) -> Table:
    names = ("chip", "decay", "pass", "chunk", "bundles", "of a chunk", "bound", "limit", "copies")
    shown = Table(*names, title="cycles of a token and head", box=None, padding=(0, 2, 0, 0))
    for figure in figures:
        shown.add_row(*figure[:3], str(figure.chunk), *(f"{x:.0f}" if x > 99 else f"{x:.2f}" for x in figure[4:]))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=["v5e", "v5p", "v6e", "tpu7x"])
    parser.add_argument("--chunk", nargs="+", type=int, choices=linear.CHUNKS, default=[128, 256, 512])
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # so that jax does not load libtpu before it is told to write schedules
    console, figures, estimates = Console(width=140, highlight=False), [], []
    for chip in arguments.chip:
        found = [measure(chip, decay, chunk, arguments.width) for decay in DECAYS for chunk in arguments.chunk]
        figures += (own := [*itertools.chain(*found)])
        console.print(table(own))
        for decay in DECAYS:
            estimates.append(estimate(chip, decay, arguments.width))
            console.print(f"xla: {estimates[-1]}")
        if arguments.json:
            rows = {name: [row._asdict() for row in rows] for name, rows in (("rows", figures), ("xla", estimates))}
            arguments.json.write_text(json.dumps({"versions": versions(), **rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
