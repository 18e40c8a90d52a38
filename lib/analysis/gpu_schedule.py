"""The machine code of GPU kernels, read from what the compilers write; no GPU is needed.

A kernel that XLA compiles for a GPU comes out as machine code (SASS), whose loops show what every turn of them issues.
Each unit of a multiprocessor takes so many numbers a cycle (CUDA C++ Programming Guide, throughput of arithmetic
instructions, capability 9.0), so that a loop cannot take fewer cycles than its busiest unit needs. That is a limit
and not a time: it sees no wait for memory, for barriers or for results. Branches within a loop count as taken, all of
them, so that it is too high where warps take one or the other.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from striate.lib.errors import UserError
from striate.lib.plan import compile_for

# A line of machine code: what it waits for, its cycles until the next may be issued, its address, the instruction.
LINE = re.compile(r"\s*\S+:.:.:.:(?P<stall>\d\d)\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?P<text>[^;]+?)\s*;?\s*$")
LABEL = re.compile(r"(?P<name>\.L_x_\d+):")
BRANCH = re.compile(r"BRA `\((?P<target>\.L_x_\d+)\)")
# Equal kernels of a program have one hash, and are compiled once.
HASH = re.compile(r'kernel_hash = ("(?:[^"\\]|\\.)*")')
PRODUCT = re.compile(r"HGMMA\.64x(?P<columns>\d+)x16\.")
# 4096 operations of 16-bit numbers a cycle, two for each pair that is multiplied: 64 x 16 pairs for every column.
COLUMNS_A_CYCLE = 2
SCHEDULERS, LANES = 4, 32
# Conversions other than packed ones go where exponentials do; moves, comparisons and choices, of float32 too, where
# integers do (Nsight Compute, pipelines XU and ALU).
INTEGERS = ("IADD3", "VIADD", "IABS", "IMNMX", "VIMNMX", "LEA", "LOP3", "SHF", "PRMT", "MOV", "SEL", "ISETP", "PLOP3")
# Results a cycle of a multiprocessor, and the instructions that go there.
UNITS = {
    "exponentials": (16, ("MUFU", "I2F", "F2I", "FRND", "POPC")),
    "integers": (64, (*INTEGERS, "FMNMX", "FSEL", "FSETP", "F2FP", "I2FP")),
    "shuffles": (32, ("SHFL",)),
}


@dataclass(frozen=True)
class Loop:
    """An innermost loop with products of matrices.

    Attributes:
      instructions: how many of each kind, by name ("HGMMA", "MUFU"...), one warp issues in a turn.
      columns: of all its products together, each of 64 rows and 16 deep.
      serialised: whether every product is waited for before the next is asked for. The assembler does that, and may not
        say so, where something writes to registers that a product under way reads or adds to.
      stalls: cycles that one warp takes to issue them if it waits for nothing but the ones just before.
    """

    instructions: Mapping[str, int]
    columns: int
    serialised: bool
    stalls: int

    @property
    def spills(self) -> int:
        """Loads from and stores to memory of what registers have no place for, by one warp in a turn."""
        return self.instructions.get("LDL", 0) + self.instructions.get("STL", 0)

    def cycles(self, warpgroups: int) -> dict[str, float]:
        """Cycles that each unit of a multiprocessor takes for a turn of so many warpgroups: "matrix", "issue"..."""
        warps = 4 * warpgroups
        taken = {"matrix": warpgroups * self.columns / COLUMNS_A_CYCLE}
        taken["issue"] = warps * sum(self.instructions.values()) / SCHEDULERS
        for unit, (rate, names) in UNITS.items():
            taken[unit] = warps * sum(self.instructions.get(name, 0) for name in names) * LANES / rate
        return taken


@dataclass(frozen=True)
class Kernel:
    """One program of a GPU.

    Attributes:
      registers: of a thread, when it starts.
      spills: bytes that are stored to memory and loaded from it because registers ran out.
      warnings: what the assembler complained of.
      loops: in the order of the program.
    """

    name: str
    registers: int
    spills: int
    warnings: tuple[str, ...]
    loops: tuple[Loop, ...]


def read(folder: Path) -> list[Kernel]:
    """The kernels that the compiler wrote into a folder, in the order in which they were compiled."""

    def number(file: Path) -> int:
        return int(file.stem.rpartition("_")[2])

    return [_kernel(log, log.with_suffix(".sass_ctrl")) for log in sorted(folder.glob("*.ptxas"), key=number)]


def _kernel(log: Path, code: Path) -> Kernel:
    said, spilled = log.read_text(), r"(\d+) bytes spill stores, (\d+) bytes spill loads"
    return Kernel(
        name=log.stem.rpartition("_")[0],
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        spills=sum(map(int, re.search(rf"stack frame, {spilled}", said).groups())),
        warnings=tuple(re.findall(r"warning\s*: (.*)", said)),
        loops=_loops(code.read_text().splitlines()),
    )


def _loops(lines: list[str]) -> tuple[Loop, ...]:
    code, labels, exits = [], {}, []
    for line in lines:
        if label := LABEL.match(line):
            labels[label["name"]] = len(code)
        elif found := LINE.match(line):
            code.append((int(found["stall"]), found["text"]))
            if found["text"] == "EXIT" and "@" not in line:
                exits.append(len(code))
    spans = []
    for end, (_, text) in enumerate(code, start=1):
        branch = BRANCH.match(text)
        start = labels[branch["target"]] if branch else end
        # Waits were moved out of the way, behind the end of the program, and jump back from there.
        if start < end and not any(start < place < end for place in exits):
            spans.append((start, end))
    loops = [span for span in spans if any(PRODUCT.match(text) for _, text in code[slice(*span)])]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return tuple(_loop(code[slice(*span)]) for span in sorted(inner))


def _loop(code) -> Loop:
    products = [text for _, text in code if PRODUCT.match(text)]
    return Loop(
        instructions=Counter(text.split()[0].split(".")[0] for _, text in code),
        columns=sum(int(PRODUCT.match(text)["columns"]) for text in products),
        serialised=len(products) > 1 and all("gsb" in text for text in products),
        stalls=sum(stall for stall, _ in code),
    )


def schedule_for(topology: str, function: Callable[..., Any], *args: Any) -> tuple[jax.stages.Compiled, list[Kernel]]:
    """Compiles a function for a described GPU, and reads the machine code of every kernel of Mosaic GPU in it.

    Args:
      topology, function, args: those of striate.lib.plan.compile_for.

    Returns:
      The compiled function, and its kernels in the order in which they were compiled, equal ones once.

    Raises:
      UserError: the compiler or the disassembler is not installed, or this process has compiled the kernels before.

    Example:
      _, kernels = schedule_for("h200:1", kernel, q, k, v)
      [(kernel.name, kernel.spills, loop.cycles(warpgroups=2)) for kernel in kernels for loop in kernel.loops]
    """
    # When it is first imported it sets MOSAIC_GPU_CUDA_ROOT, so before we do.
    importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    with tempfile.TemporaryDirectory(prefix="striate-schedule-") as folder:
        given = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_CUDA_ROOT": str(_tools())}
        with mock.patch.dict(os.environ, given):
            compiled = compile_for(topology, function, *args)
        kernels = read(Path(folder))
    if len(kernels) < len(set(HASH.findall(compiled.as_text()))):
        raise UserError(
            f"The compiler wrote {len(kernels)} kernels, and the program has more: it compiles each only once in a "
            "process. Read the schedule first."
        )
    return compiled, kernels


def _tools() -> Path:
    """The folder of CUDA's programs."""
    installed = importlib.util.find_spec("nvidia")
    wheels = [Path(path) / "cu13" for path in (installed.submodule_search_locations if installed else [])]
    for root in (*wheels, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))):
        if (root / "bin" / "nvdisasm").exists():
            return root
    raise UserError('To read machine code takes nvdisasm: pip install "striate[gpu-compiler]".')
