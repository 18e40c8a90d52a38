"""Attention kernels for GPUs by their machine code: what every unit has to do in a turn of a loop. Needs no GPU.

    striate bench gpu-schedule [--json FILE]
    python benchmarks/gpu_schedule.py [--chip h200] [--width 64 128 192/128 256] [--json FILE]

Needs the compiler of GPUs and the disassembler: pip install "striate[gpu-compiler]". Both passes of causal attention in
bf16 to keys of the same document, 8192 tokens; a width is that of queries and keys, and after a stroke that of values.

A kernel has a loop over blocks that the mask leaves whole and one over those that it cuts. "spills" is how often a
thread goes to memory in a turn because registers ran out. "matrix" is the cycles that the matrix units of a
multiprocessor take for a turn of both of its warpgroups; "issue", "exp." and "integers" are the cycles for which
schedulers, exponentials and integers (with comparisons, choices and conversions) are taken, as shares of that. "limit"
names the busiest. That is a limit and not a time: no turn takes fewer cycles, and one takes
more where it waits for memory, for the other warpgroup or for results. Blocks differ with the width and the kernel, so
that shares compare and cycles do not. Branches within a loop count as taken, all of them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from striate.lib import masks
from striate.lib.analysis.gpu_schedule import Kernel, schedule_for
from striate.lib.attention import EXPERIMENTAL, attention
from striate.lib.tokens import Tokens
from striate.pallas_kernels.gpu.chips import CHIPS

HEADS, LENGTH, WARPGROUPS = 4, 8192, 2
MASK = masks.causal() & masks.same("document")
LOOPS = ("whole", "masked")  # in the order of the program
UNITS = {"issue": "issue", "exponentials": "exp.", "integers": "integers"}  # and what the table calls them


class Figure(NamedTuple):
    """Of one loop of a kernel; cycles are those of a turn, by unit."""

    chip: str
    width: str
    kernel: str
    loop: str
    registers: int
    spills: int
    serialised: bool
    cycles: dict[str, float]

    @property
    def limit(self) -> str:
        """The unit that takes the most cycles."""
        return max(self.cycles, key=self.cycles.get)


def compiled_kernels(chip: str, width: str) -> list[Kernel]:
    """The kernels of both passes for heads of "width" or "width/width of values"."""
    head_dim, _, values = width.partition("/")
    q = jax.ShapeDtypeStruct((1, LENGTH, HEADS, int(head_dim)), jnp.bfloat16)
    v = jax.ShapeDtypeStruct((1, LENGTH, HEADS, int(values or head_dim)), jnp.bfloat16)
    field = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)

    def loss(q, k, v, tokens):
        out = attention(q, k, v, mask=MASK, q_tokens=tokens, k_tokens=tokens, implementation="pallas_gpu")
        return out.astype(jnp.float32).sum()

    return schedule_for(f"{chip}:1", jax.grad(loss, (0, 1, 2)), q, q, v, Tokens(field, field))[1]


def figures(chip: str, width: str) -> list[Figure]:
    found = []
    for kernel in compiled_kernels(chip, width):
        names = LOOPS if len(kernel.loops) == len(LOOPS) else map(str, range(1, len(kernel.loops) + 1))
        for name, loop in zip(names, kernel.loops, strict=True):
            whose = chip, width, kernel.name, name, kernel.registers, loop.spills
            found.append(Figure(*whose, loop.serialised, loop.cycles(WARPGROUPS)))
    return found


def table(chip: str, found: list[Figure]) -> Table:
    """A row for every loop, those of a kernel one below the other."""
    title = f"{chip}: cycles of a turn of {WARPGROUPS} warpgroups, and shares of them"
    shown = Table("width", "kernel", "loop", title=title, box=None, padding=(0, 2, 0, 0))
    for name in ("spills", "matrix", *UNITS.values()):
        shown.add_column(name, justify="right")
    shown.add_column("limit")
    for figure in found:
        matrix = figure.cycles["matrix"]
        shares = [f"{figure.cycles[unit] / matrix:.2f}" for unit in UNITS]
        shown.add_row(*figure[1:4], str(figure.spills), f"{matrix:.0f}", *shares, figure.limit)
    return shown


def versions() -> dict[str, str]:
    names = ("jax", "jax-cuda13-plugin", "nvidia-cuda-nvdisasm")
    present = {distribution.name for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in names if name in present}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    hopper = [name for name, chip in CHIPS.items() if chip.capability == "9.0"]
    parser.add_argument("--chip", choices=hopper, default="h200")
    parser.add_argument("--width", nargs="+", default=["64", "128", "192/128", "256"], help="of a head")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.environ[EXPERIMENTAL] = "pallas_gpu"
    console, found = Console(width=100, highlight=False), []
    with console.status("") as status:
        for width in arguments.width:
            status.update(f"{arguments.chip}, heads of {width}")
            found += figures(arguments.chip, width)
    console.print(table(arguments.chip, found))
    for figure in found:
        if figure.serialised:
            console.print(f"{figure.width}, {figure.kernel}, {figure.loop}: every product is waited for")
    if arguments.json:
        rows = [figure._asdict() | {"limit": figure.limit} for figure in found]
        arguments.json.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
