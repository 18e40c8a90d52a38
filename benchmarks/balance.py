"""How evenly masks spread over 8 and over 64 devices, at a million tokens: predicted on the host.

    striate bench balance [--json FILE]

For every mask, what `striate.parallel.choose` takes for a TPU v5p, and its critical path over the ideal: the live tiles
that no layout of those compared can do without, shared out evenly. Tiles are those of the kernel, 512 x 512 on 8
devices and 128 x 128 on 64, where shards are shorter. Beside it the best that a ring does, and gathered keys.

"At least" is a bound for every order of the same tiles. A ring brings every shard of keys to every shard of queries
once, so that it waits for all the work of the shard whose keys, or whose queries, have most of it; a tile of keys that
every query sees (a sink) makes that more than an even share.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from striate.lib import masks
from striate.lib.layouts import TileMap
from striate.lib.masks import Mask
from striate.lib.parallel.choose import HARDWARE, Candidate, choose
from striate.lib.parallel.gather import AllGather
from striate.lib.parallel.ring import Ring
from striate.lib.tokens import Tokens

LENGTH = 1 << 20
HEADS, KV_HEADS, WIDTH = 32, 8, 128
WINDOW, SINK, CHUNK, PREFIX, MEAN = 4096, 4, 4096, 1 << 18, 16384


@dataclass(frozen=True)
class Row:
    """What was predicted for one mask on some devices. Ratios are critical paths over the ideal."""

    mask: str
    devices: int
    tile: int
    ideal: float
    chosen: str
    ratio: float
    least: float
    ring: float
    ring_least: float
    gathered: float
    seconds: float
    host_seconds: float


def lengths(mean: int, seed: int) -> np.ndarray:
    """Random lengths (log-normal, at least 64 tokens) that fill LENGTH; the last one is cut."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - 0.5, 1.0, size=4 * LENGTH // mean)
    ends = np.minimum(np.cumsum(np.maximum(drawn, 64).astype(int)), LENGTH)
    return np.diff(ends[: np.searchsorted(ends, LENGTH) + 1], prepend=0)


def runs(pieces: np.ndarray) -> np.ndarray:
    """int32 (1, LENGTH): the number of the piece that each token is in."""
    return np.repeat(np.arange(len(pieces), dtype=np.int32), pieces)[None]


def problems() -> dict[str, tuple[Mask, Tokens]]:
    """The masks by name, each with its Tokens."""
    index = np.arange(LENGTH, dtype=np.int32)[None]
    one = Tokens(position=index, document=index * 0)
    documents = lengths(MEAN, seed=0)
    starts = np.repeat(np.cumsum(documents) - documents, documents)
    packed = Tokens(position=(index - starts).astype(np.int32), document=runs(documents))
    inside, near = masks.same("document"), masks.window(WINDOW - 1) | masks.sink(SINK)
    clean, half = (index < LENGTH // 2).astype(np.int32), LENGTH // 2
    forced = one.replace(kind=1 - clean, chunk=index % half // CHUNK, position=index % half)
    # clean tokens see clean chunks up to their own, noisy ones the clean chunks before their own and their own, noisy.
    forcing = (masks.table("kind", "kind", [[1, 0], [0, 0]]) & masks.at_least("chunk")) | (
        (masks.table("kind", "kind", [[0, 0], [1, 0]]) & masks.after("chunk"))
        | (masks.table("kind", "kind", [[0, 0], [0, 1]]) & masks.same("chunk"))
    )
    return {
        "causal": (masks.causal(), one),
        "window": (masks.window(WINDOW - 1), one),
        "window + sink": (masks.causal() & near, one),
        "packed window + sink": (masks.causal() & near & inside, packed),
        "packed causal": (masks.causal() & inside, packed),
        "packed bidirectional": (inside, packed),
        "prefix-LM": (masks.causal() | masks.prefix(), one.replace(prefix=(index < PREFIX).astype(np.int32))),
        "chunk causal": (masks.at_least("chunk"), one.replace(chunk=index // CHUNK)),
        "dilated by 8": (masks.window(8 * WINDOW - 1) & masks.modulo("position", "position", 8), one),
        "causal + segments": (masks.causal() | masks.same("segment"), one.replace(segment=runs(lengths(MEAN, seed=1)))),
        "teacher forcing": (forcing, forced),
    }


def least_path(live: np.ndarray, ring: int) -> float:
    """Tiles on the critical path of so many devices around a ring, in any order of the tiles, at least."""
    bounds = [live.sum(dtype=np.int64) / ring]
    for axis in (0, 1):
        work = np.sort(live.sum(axis=axis, dtype=np.int64))
        bounds.append(work[-1] + work[: len(work) // ring - 1].sum())
    return float(max(bounds))


def measure(name: str, mask: Mask, tokens: Tokens, devices: int) -> Row:
    start = time.process_time()
    choice = choose(mask, tokens, devices, heads=HEADS, kv_heads=KV_HEADS, head_dim=WIDTH, hardware=HARDWARE["v5p"])
    spent = time.process_time() - start
    known = [candidate for candidate in choice.candidates if candidate.costs]
    ideal = min(candidate.ideal for candidate in known)

    def ratio(candidate: Candidate) -> float:
        return candidate.costs.path / ideal

    def least(candidate: Candidate) -> float:
        ring = 1 if candidate.strategy.kind is AllGather else devices // candidate.strategy.dealt
        whole = candidate.layout.places(LENGTH, choice.tile) is not None
        live = natural if whole else TileMap.of(mask, candidate.layout.permute(tokens), tile).live
        return least_path(live, ring) * ring / devices / ideal

    tile = choice.tile, choice.tile
    natural = TileMap.of(mask, tokens, tile).live
    best = {kind: min((c for c in known if c.strategy.kind is kind), key=ratio) for kind in (Ring, AllGather)}
    return Row(
        mask=name,
        devices=devices,
        tile=choice.tile,
        ideal=ideal,
        chosen=str(choice.chosen),
        ratio=ratio(choice.chosen),
        least=least(choice.chosen),
        ring=ratio(best[Ring]),
        ring_least=least(best[Ring]),
        gathered=ratio(best[AllGather]),
        seconds=choice.chosen.seconds,
        host_seconds=spent,
    )


def table(rows: list[Row]) -> Table:
    title = f"{LENGTH} tokens, {HEADS} heads of {WIDTH}, {KV_HEADS} key/value heads; ratios: critical path / ideal"
    shown = Table("mask", title=title, box=None, padding=(0, 2, 0, 0))
    for column in ("devices", "ideal"):
        shown.add_column(column, justify="right")
    shown.add_column("chosen")
    for column in ("ratio", "at least", "time", "ring", "at least", "gather", "host"):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            row.mask,
            str(row.devices),
            f"{row.ideal:.0f}",
            row.chosen,
            *(f"{ratio:.3f}" for ratio in (row.ratio, row.least)),
            f"{row.seconds * 1e3:.0f} ms",
            *(f"{ratio:.3f}" for ratio in (row.ring, row.ring_least, row.gathered)),
            f"{row.host_seconds:.1f} s",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    before, console = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Console(width=140, highlight=False)
    cases, rows = problems(), []
    for devices in (8, 64):
        for name, (mask, tokens) in cases.items():
            rows.append(measure(name, mask, tokens, devices))
    console.print(table(rows))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    console.print(f"host: {sum(row.host_seconds for row in rows):.0f} s of one core in all, {grown:.0f} MB at the peak")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"megabytes": grown, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
