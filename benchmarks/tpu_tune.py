"""Finds how attention is best cut into blocks on each chip, by the compiled schedule; no TPU is needed.

    striate bench tpu-tune [--chip v5p v6e] [--width 64 128 256 512] [--write]

Where there is a TPU, --time ranks by the clock instead, for the chip that is there. --write puts the best into
pallas_kernels/tpu/blocks.json, under the bytes of a head in bfloat16: float32 uses the row of twice the width.

Tiles and their parts are tried in turn, forward and backward; the best tile is the one with the fewest cycles of both
passes together. A cycle is a bundle of the schedule, and no fewer than the matrix units need (`limit`): with fewer
bundles than that a kernel waits for them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from rich.console import Console
from tpu_schedule import CHIPS, PASSES, Case, measure, ours

from striate.pallas_kernels.tpu.blocks import FILE, Blocks, Parts
from striate.pallas_kernels.tpu.chips import target

# Largest first; a head wider than 256 takes as much less.
TILES = ((2048, 1024), (1024, 2048), (1024, 1024), (1024, 512), (512, 512))
PARTS = (Parts(256, 1024, 0), Parts(256, 1024, 1), Parts(512, 512, 1), Parts(512, 1024, 0), Parts(1024, 512, 0))
PARTS += (Parts(1024, 512, 1), Parts(512, 512, 0), Parts(256, 512, 1), Parts(512, 1024, 1), Parts(1024, 1024, 1))
MASKED = 0.25  # of all tiles, in what is ranked
TIE = 1e-3  # what a bundle counts where the matrix units are waited for anyway


def candidates(width: int) -> Iterator[Blocks]:
    """Tiles that may fit, each with every way to cut it; both passes are cut alike, and judged apart."""
    largest = 2**21 * 256 // max(width, 256)
    for tile in (tile for tile in TILES if largest // 2 <= tile[0] * tile[1] <= largest):
        for parts in (parts for parts in PARTS if parts.queries <= tile[0] and parts.keys <= tile[1]):
            yield Blocks(tile, parts, parts)


def cycles(chip: str, width: int, case: Case) -> float:
    """Of a tile of 1024 x 1024, some of them masked."""
    found = {figure.kind: figure.bundles for figure in measure(chip, width, case)}
    limit = CHIPS[chip].limit(width, case.directions[0])
    bundles = sum(share * found[kind] for kind, share in (("unmasked", 1 - MASKED), ("masked", MASKED)))
    return max(bundles, limit) + TIE * bundles


def seconds(case: Case) -> float:
    """Of a call, on the TPU that is here."""
    keys = jax.random.split(jax.random.key(0), len(case.args))
    args = [
        jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype) for key, x in zip(keys, case.args, strict=True)
    ]
    run = jax.jit(case.function)
    jax.block_until_ready(run(*args))
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def tune(chip: str, width: int, by_time: bool, console: Console) -> Blocks:
    """The best blocks for heads of that width."""
    found: dict[tuple, dict[str, tuple[float, Parts]]] = {}
    tried = list(candidates(width))
    with console.status("") as status:
        for number, blocks in enumerate(tried, 1):
            status.update(f"{chip}, heads of {width}: {number} of {len(tried)}, {blocks.tile} by {blocks.forward}")
            for case in ours(chip, width, blocks):
                try:
                    cost = seconds(case) if by_time else cycles(chip, width, case)
                except (jax.errors.JaxRuntimeError, ValueError) as error:  # most often: too large for the memory
                    console.print(f"{case.blocks} does not compile: {str(error).splitlines()[0][:150]}", style="dim")
                    continue
                best = found.setdefault(blocks.tile, {})
                known = best.get(case.directions[0])
                if known is None or cost < known[0]:
                    best[case.directions[0]] = cost, blocks.forward
    both = {tile: best for tile, best in found.items() if len(best) == 2}
    for tile, best in sorted(both.items(), key=lambda item: sum(cost for cost, _ in item[1].values())):
        shown = ", ".join(f"{name} {best[name][0]:.4g} by {tuple(best[name][1])}" for name in PASSES)
        console.print(f"{chip}, heads of {width}, tile {tile[0]}x{tile[1]}: {shown}")
    tile = min(both, key=lambda tile: sum(cost for cost, _ in both[tile].values()))
    return Blocks(tile, *(both[tile][name][1] for name in PASSES))


def write(chip: str, size: int, blocks: Blocks) -> None:
    """Puts one row into the table, in the place of the one that it had."""
    rows = {(row["chip"], row["bytes"]): row for row in json.loads(FILE.read_text())}
    rows[chip, size] = {"chip": chip, "bytes": size, **blocks._asdict()}
    order = sorted(rows, key=lambda key: (list(CHIPS).index(key[0]), key[1]))
    FILE.write_text("[\n" + ",\n".join("  " + json.dumps(rows[key]) for key in order) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS), help="all of them by default")
    parser.add_argument("--width", nargs="+", type=int, default=[64, 128, 256, 512], help="of a head")
    parser.add_argument("--time", action="store_true", help="by the clock, on the TPU that is here")
    parser.add_argument("--write", action="store_true", help="put the best into the table")
    arguments = parser.parse_args()
    if arguments.time:
        arguments.chip = [target()]
    else:
        jax.config.update("jax_platforms", "cpu")  # so that jax does not load libtpu before it writes schedules
    console = Console(width=140, highlight=False)
    for chip, width in itertools.product(arguments.chip, arguments.width):
        best = tune(chip, width, arguments.time, console)
        if arguments.write:
            write(chip, 2 * width, best)


if __name__ == "__main__":
    main()
