"""The machine schedule of TPU kernels, read from what the TPU compiler writes; no TPU is needed.

A TPU core issues one bundle a cycle when nothing stalls, and every unit has so many slots in a bundle. The bundles of
a kernel are therefore a static figure: they see no wait for memory, and the matrix unit may not keep up with its slots.
Two kernels compiled for one chip by one compiler compare by them; they are not a time.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from striate.lib.errors import UserError
from striate.lib.plan import compile_for

# A line of the schedule: the number of the bundle, whether control may come to it from elsewhere, its instructions.
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?P<label>[A-Z]{2})?\s*:(?P<instructions>.*)")
SCHEDULE, USE = "-final_bundles.txt", "-final_hlo-static-per-bundle-utilization.txt"


@dataclass(frozen=True)
class Block:
    """A basic block: bundles that run one after the other, entered only at the first and left only after the last.

    Attributes:
      bundles: how many.
      units: slots that are used in all of them, by unit: "MXU" (matrix), "VALU", "XLU", "EUP", "VLOAD"...
      capacity: slots of each unit in one bundle.
    """

    bundles: int
    units: Mapping[str, int]
    capacity: Mapping[str, int]

    @property
    def bound(self) -> int:
        """The fewest bundles that hold the matrix work that is issued here."""
        return -(-self.units["MXU"] // self.capacity["MXU"])

    @property
    def spills(self) -> int:
        """Vector registers that are stored to memory because they ran out."""
        return self.units["VSTORE:SPILL"]

    def use(self, unit: str) -> float:
        """The share of the slots of a unit that is used, 0 to 1."""
        return self.units[unit] / (self.bundles * self.capacity[unit])


@dataclass(frozen=True)
class Kernel:
    """One program on a core: a Pallas kernel, or a fusion that XLA made. Blocks are in the order of the program."""

    name: str
    blocks: tuple[Block, ...]

    @property
    def bundles(self) -> int:
        return sum(block.bundles for block in self.blocks)

    @property
    def spills(self) -> int:
        return sum(block.spills for block in self.blocks)

    @property
    def matrix_blocks(self) -> tuple[Block, ...]:
        """The blocks that issue matrix work.

        A kernel with one body for masked tiles and one for the others has two, and a grid step runs one of them.
        """
        return tuple(block for block in self.blocks if block.units["MXU"])


def read(folder: Path) -> list[Kernel]:
    """The kernels that libtpu wrote into a folder, in the order in which they were compiled."""
    kernels = []
    for file in sorted(folder.glob(f"*{SCHEDULE}")):
        stem = re.fullmatch(r"(?P<key>\d+-(?P<name>.+))-\d+", file.name.removesuffix(SCHEDULE))
        use = [other for other in folder.iterdir() if re.fullmatch(re.escape(stem["key"]) + r"-\d+" + USE, other.name)]
        if use:
            kernels.append(Kernel(stem["name"], _blocks(file.read_text(), use[0].read_text())))
    return kernels


def _blocks(schedule: str, use: str) -> tuple[Block, ...]:
    """The basic blocks of one kernel; `use` has a line of units, one of their capacities, and a row for each bundle."""
    _, names, capacities, _, *lines = use.splitlines()
    units = [name.strip() for name in names.split(",")]
    capacity = dict(zip(units, map(int, capacities.split()), strict=True))
    rows = [tuple(map(int, line.split())) for line in lines if line.strip()]
    bundles = [found for line in schedule.splitlines() if (found := BUNDLE.match(line))]
    if len(bundles) != len(rows):
        raise ValueError(
            f"A schedule of {len(bundles)} bundles has the use of {len(rows)}: libtpu writes another form."
        )
    starts, branched = [], True
    for index, bundle in enumerate(bundles):
        if branched or bundle["label"]:
            starts.append(index)
        branched = "sbr.rel" in bundle["instructions"]
    return tuple(
        Block(end - start, dict(zip(units, map(sum, zip(*rows[start:end], strict=True)), strict=True)), capacity)
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True)
    )


@functools.cache
def _dump() -> Path:
    """The folder that libtpu writes schedules to. Only its first load in a process reads where that is."""
    folder = Path(tempfile.mkdtemp(prefix="striate-schedule-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final_"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    return folder


def schedule_for(topology: str, function: Callable[..., Any], *args: Any) -> tuple[jax.stages.Compiled, list[Kernel]]:
    """Compiles a function for a described topology, and reads the schedule of every kernel in it.

    Args:
      topology, function, args: those of striate.lib.plan.compile_for.

    Returns:
      The compiled function, and its kernels in the order in which they were compiled.

    Raises:
      UserError: libtpu is not installed, it knows no such topology, or this process had loaded it before.

    Example:
      _, kernels = schedule_for("v6e:2x2", kernel, q, k, v)
      [(kernel.name, block.bundles, block.bound) for kernel in kernels for block in kernel.matrix_blocks]
    """
    folder = _dump()
    for file in folder.iterdir():
        file.unlink()
    compiled = compile_for(topology, function, *args)
    if not any(folder.iterdir()):
        raise UserError(
            f"libtpu wrote no schedule for {topology}: this process had loaded it before, without asking for any. "
            "Start it with JAX_PLATFORMS=cpu, so that jax does not load it, and read schedules first."
        )
    return compiled, read(folder)
