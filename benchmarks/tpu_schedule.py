"""Attention kernels for TPUs by their machine schedule: bundles of a 1024 x 1024 tile of bf16 logits. Needs no TPU.

    striate bench tpu-schedule [--json FILE]
    python benchmarks/tpu_schedule.py [--chip v5p v6e] [--width 64 128 256] [--all] [--json FILE]

Needs the compiler of TPUs: pip install "striate[tpu]". Rivals: the splash attention of jax, and that of tokamax where
it is installed, each at its best block sizes: --all tries every one, else it is those that were best for
benchmarks/results/tpu-schedule.json, for that width or for another, or a handful where that has none. tokamax's takes
exponentials of base 2, as it does by default; an "s" after block sizes says that its experimental scheduler was on.

A bundle is what a core issues in one cycle if nothing stalls. "bound" is the fewest bundles that hold the matrix work
that was issued; "limit" is the cycles that the matrix units take for it at their peak rate, heads being padded to the
side of a unit: a kernel with fewer bundles than that waits for them. A masked tile is one that a causal mask cuts;
ours does it by quarters, three of them, and jax's splash has one body, which masks every tile where there is such a
mask. All are scaled to a tile of 1024 x 1024.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from striate.lib import masks
from striate.lib.analysis.tpu_schedule import schedule_for
from striate.lib.attention import attention
from striate.pallas_kernels.tpu import blocks as tpu_blocks

RESULTS = Path(__file__).parent / "results" / "tpu-schedule.json"
HEADS, LENGTH, TILE = 4, 8192, 1024
PASSES, KINDS = ("forward", "backward"), ("unmasked", "masked")
BACKWARD = re.compile("bwd|backward|dkv|dq")  # in the names of kernels
PRODUCTS = {"forward": 2, "backward": 5}  # of matrices, in a tile
OURS = "striate"
# Our matrix blocks in the order of the program: a whole tile; then, for each of its quarters, one without the mask and
# one with it. A tile that a causal mask cuts has one quarter hidden, one whole and two cut.
OUR_KINDS = {
    "forward": ("unmasked", None, "masked", None, None, "masked", None, None, "masked"),
    "backward": ("unmasked", None, "masked", "masked", None, None, None, None, "masked"),
}

# Queries and keys of a block, and keys that are computed at a time.
SIDES, PARTS = (512, 1024, 2048), (256, 512, 1024, 2048)
ALL_BLOCKS = [blocks for blocks in itertools.product(SIDES, SIDES, PARTS) if blocks[2] <= blocks[1]]
SOME_BLOCKS = [(512, 2048, 1024), (1024, 1024, 512), (1024, 2048, 256), (1024, 2048, 1024)]


class Chip(NamedTuple):
    """What to compile for, and of one core: the side of its matrix units, and their multiply-adds in a cycle."""

    topology: str
    side: int
    rate: int

    def limit(self, width: int, direction: str) -> int:
        """Cycles of the matrix units for a tile of heads that are so wide."""
        padded = -(-width // self.side) * self.side
        return PRODUCTS[direction] * TILE * TILE * padded // self.rate


CHIPS = {
    "v4": Chip("v4:2x2x1", 128, 1 << 16),
    "v5e": Chip("v5e:2x2", 128, 1 << 16),
    "v5p": Chip("v5p:2x2x1", 128, 1 << 16),
    "v6e": Chip("v6e:2x2", 256, 1 << 18),
    "tpu7x": Chip("tpu7x:2x2x1", 256, 1 << 18),
}


class Case(NamedTuple):
    """A program to compile, and how its kernels are read.

    Attributes:
      kernel: whose it is, as the table says it.
      blocks: block sizes, as the table says them.
      directions: those of PASSES whose kernels count.
      tile: queries and keys that a matrix block goes over.
      kinds: for each matrix block of a kernel, in the order of the program: one of KINDS, or None to leave it out.
    """

    kernel: str
    blocks: str
    function: Callable
    args: tuple
    directions: tuple[str, ...]
    tile: tuple[int, int]
    kinds: tuple[str | None, ...]


class Figure(NamedTuple):
    """Of one tile of TILE x TILE logits. `bundles` and what follows is scaled to it from the tile of the kernel."""

    chip: str
    width: int
    kernel: str
    direction: str
    kind: str
    blocks: str
    bundles: float
    bound: float
    spills: float


def ours(chip: str, width: int, blocks: tpu_blocks.Blocks | None = None) -> Iterator[Case]:
    """Our programs, with the blocks given, or those that they have on that chip."""
    q = jax.ShapeDtypeStruct((1, LENGTH, HEADS, width), jnp.bfloat16)

    blocks = blocks or tpu_blocks.of(chip, q)

    def attend(q, k, v):
        return attention(q, k, v, mask=masks.causal(), implementation="pallas_tpu")

    def gradients(q, k, v):
        return jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    def cut(function):
        def with_these_blocks(*args):
            with mock.patch.object(tpu_blocks, "of", lambda chip, k: blocks):
                return function(*args)

        return with_these_blocks

    for direction, function, parts in zip(PASSES, (attend, gradients), blocks[1:], strict=True):
        label = "{}x{} by {}x{}".format(*blocks.tile, parts.queries, parts.keys)
        yield Case(OURS, label, cut(function), (q, q, q), (direction,), blocks.tile, OUR_KINDS[direction])


def jax_splash(blocks: tuple[int, int, int], mask: str) -> Callable:
    """(q, k, v) -> out, each (HEADS, LENGTH, width)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    queries, keys, at_once = blocks
    sizes = splash_attention_kernel.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=at_once,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=at_once,
        use_fused_bwd_kernel=True,
    )
    masks = splash_attention_mask.MultiHeadMask([getattr(splash_attention_mask, mask)((LENGTH, LENGTH))] * HEADS)
    return splash_attention_kernel.make_splash_mha(masks, block_sizes=sizes, head_shards=1, q_seq_shards=1)


def tokamax_splash(blocks: tuple[int, int, int], mask: str, scheduler: bool) -> Callable:
    """(q, k, v) -> out, each (HEADS, LENGTH, width)."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    queries, keys, at_once = blocks
    config = splash_attention_kernel.SplashConfig(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=at_once,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=at_once,
        use_experimental_scheduler=scheduler,
    )
    shown = getattr(splash_attention_mask, mask)((LENGTH, LENGTH))
    return splash_attention_kernel.make_splash_mha_single_device(shown, config=config)


def has_tokamax() -> bool:
    return importlib.util.find_spec("tokamax") is not None


def splash_cases(kernel: str, width: int, blocks: tuple[int, int, int], scheduler: bool) -> Iterator[Case]:
    """The programs of a rival at one choice of block sizes."""
    args = (jax.ShapeDtypeStruct((HEADS, LENGTH, width), jnp.bfloat16),) * 3
    label = "{}x{}/{}".format(*blocks) + " s" * scheduler
    for mask in ("FullMask", "CausalMask"):

        def attend(q, k, v, mask=mask):
            splash = tokamax_splash(blocks, mask, scheduler) if kernel == "tokamax" else jax_splash(blocks, mask)
            return splash(q, k, v)

        def gradients(q, k, v, attend=attend):
            return jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

        # tokamax's has a body for tiles that the mask leaves whole, and after it one for those that it cuts.
        kinds = ("unmasked",) if mask == "FullMask" else KINDS if kernel == "tokamax" else ("masked",)
        yield Case(kernel, label, attend, args, ("forward",), blocks[:2], kinds)
        if not scheduler:  # it makes no difference to the backward kernel
            yield Case(kernel, label, gradients, args, ("backward",), blocks[:2], kinds)


def rivals(chip: str, width: int, everything: bool) -> Iterator[Case]:
    """All there is to compile; or what was best when all was, at any width; or a handful, where that is not known."""
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() and not everything else []
    for kernel in ("jax", *["tokamax"] * has_tokamax()):
        known = [row for row in rows if (row["chip"], row["kernel"]) == (chip, kernel)]
        known = [row for row in known if row["width"] == width] or known
        wanted = {(row["direction"], row["kind"], row["blocks"]) for row in known}
        for blocks, scheduler in itertools.product(ALL_BLOCKS, (False, True) if kernel == "tokamax" else (False,)):
            for case in splash_cases(kernel, width, blocks, scheduler):
                reads = {(direction, kind, case.blocks) for direction in case.directions for kind in case.kinds}
                if everything or (wanted & reads if wanted else blocks in SOME_BLOCKS):
                    yield case


def measure(chip: str, width: int, case: Case) -> list[Figure]:
    """The figures of one case."""
    _, kernels = schedule_for(CHIPS[chip].topology, case.function, *case.args)
    area, sums = TILE * TILE / (case.tile[0] * case.tile[1]), {}
    for kernel in kernels:
        direction = PASSES[bool(BACKWARD.search(kernel.name))]
        if direction not in case.directions or not kernel.matrix_blocks:
            continue
        for kind, block in zip(case.kinds, kernel.matrix_blocks, strict=True):
            old = sums.get((direction, kind), (0, 0, 0))
            new = (block.bundles, block.bound, block.spills)
            sums[direction, kind] = tuple(map(sum, zip(old, (area * x for x in new), strict=True)))
    return [
        Figure(chip, width, case.kernel, direction, kind, case.blocks, *sums[direction, kind])
        for direction, kind in sums
        if kind
    ]


def best(figures: Iterable[Figure]) -> list[Figure]:
    """Of each kernel, direction and kind, the one with the fewest bundles."""
    found: dict[tuple, Figure] = {}
    for figure in sorted(figures, key=lambda figure: figure.bundles):
        found.setdefault((figure.kernel, figure.direction, figure.kind), figure)
    return list(found.values())


def run(chip: str, width: int, everything: bool, console: Console) -> list[Figure]:
    cases = [*ours(chip, width), *rivals(chip, width, everything)]
    found = []
    with console.status("") as status:
        for index, case in enumerate(cases, 1):
            name = f"{chip}, heads of {width}, {case.kernel} {case.blocks} {' and '.join(case.directions)}"
            status.update(f"{index} of {len(cases)}: {name}")
            try:
                found += measure(chip, width, case)
            except jax.errors.JaxRuntimeError as error:  # most often because its blocks are too large for the memory
                console.print(f"{name} does not compile: {str(error).splitlines()[0][:200]}", style="dim")
    return best(found)


def table(chip: str, figures: list[Figure]) -> Table:
    """A row for every width, direction and kernel: first the unmasked tile, then the masked one."""
    shown = Table("width", "pass", "kernel", title=f"{chip}: bundles of a tile", box=None, padding=(0, 2, 0, 0))
    for name in ("limit", *("unmasked", "bound", "spills", "of best"), *("masked", "bound", "spills", "of best")):
        shown.add_column(name, justify="right")
    shown.add_column("blocks")
    rows: dict[tuple, dict[str, Figure]] = {}
    for figure in sorted(figures, key=lambda x: (x.width, PASSES.index(x.direction), x.kernel != OURS, x.kernel)):
        rows.setdefault((figure.width, figure.direction, figure.kernel), {})[figure.kind] = figure
    for (width, direction, kernel), kinds in rows.items():
        cells = [str(width), direction, kernel, str(CHIPS[chip].limit(width, direction))]
        for kind in KINDS:
            peers = [x for key, x in rows.items() if key[:2] == (width, direction) and key[2] != OURS]
            others = [x[kind].bundles for x in peers if kind in x]
            figure = kinds.get(kind)
            values = (figure.bundles, figure.bound, figure.spills) if figure else (None,) * 3
            cells += ["" if value is None else f"{value:.0f}" for value in values]
            cells.append(f"{figure.bundles / min(others):.3f}" if figure and others else "")
        shown.add_row(*cells, ", ".join(dict.fromkeys(figure.blocks for figure in kinds.values())))
    return shown


def versions() -> dict[str, str]:
    names = ("jax", "libtpu", *["tokamax"] * has_tokamax())
    return {name: importlib.metadata.version(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS), help="all of them by default")
    parser.add_argument("--width", nargs="+", type=int, default=[64, 128, 256], help="of a head")
    parser.add_argument(
        "--all", action="store_true", help="try all block sizes of the rivals: half an hour a chip and width"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # so that jax does not load libtpu before it is told to write schedules
    console, figures = Console(width=140, highlight=False), []
    for chip in arguments.chip:
        found = []
        for width in arguments.width:
            found += run(chip, width, arguments.all, console)
        console.print(table(chip, found))
        figures += found
        if arguments.json:
            rows = [figure._asdict() for figure in figures]
            arguments.json.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
