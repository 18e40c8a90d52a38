"""Attention on this machine's default device, as ratios against named rivals in one run.

    python benchmarks/attention.py [causal packed tiles band-tiles] [--length 8192] [--json FILE]

causal: forward + backward, 8 heads of 64, float32, against jax.nn.dot_product_attention (xla), tokamax's xla_chunked
(where tokamax is installed), and the same blockwise code made to visit every block.
packed: documents of about 1k tokens against the causal mask of the same length.
tiles, band-tiles: the causal mask and a window of 1024 over tile lengths, for the choice in lib/blockwise.py.

The limit beside each row is the time of its floating-point operations alone, at the rate of a large matrix product
measured in the same run. Temp is what the compiled program allocates beside its arguments and results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from striate.lib import masks
from striate.lib.attention import attention
from striate.lib.blockwise import Blockwise
from striate.lib.tokens import Tokens

HEADS, WIDTH = 8, 64
DOCUMENT = 1024


@dataclass(frozen=True)
class Row:
    """One measurement."""

    name: str
    seconds: float
    temp_megabytes: float
    limit_seconds: float


class Unskipped(masks.Mask):
    """A mask that cannot tell about blocks: the same pairs, every block visited with mask arithmetic."""

    def __init__(self, mask: masks.Mask):
        self.mask = mask

    query_reads = property(lambda self: self.mask.query_reads)
    key_reads = property(lambda self: self.mask.key_reads)
    is_band = property(lambda self: self.mask.is_band)

    def tile(self, query, key):
        return self.mask.tile(query, key)

    def bounds(self, query, key):
        none, all_ = self.mask.bounds(query, key)
        return none & ~none, all_ & ~all_


def best_of(function: Callable, *arguments, repeats: int, warm: bool = True) -> float:
    """Seconds of the fastest of some calls; with `warm`, after one that does not count."""
    seconds = []
    for _ in range(repeats + warm):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds[warm:])


def matrix_rate() -> float:
    """Floating-point operations per second of a 2048 x 2048 product."""
    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    return 2 * 2048**3 / best_of(jax.jit(jnp.matmul), x, x, repeats=5)


def measure(name: str, attend: Callable, length: int, pairs: float, rate: float, repeats: int = 3) -> Row:
    """Forward + backward of attend(q, k, v) on random arrays; `pairs` visible pairs bound the work from below."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, (1, length, HEADS, WIDTH)) for key in keys)

    def both(q, k, v, d_out):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(d_out)

    program = jax.jit(both).lower(q, k, v, d_out).compile()
    temp = program.memory_analysis().temp_size_in_bytes / 1e6
    operations = 7 * 2 * pairs * WIDTH * HEADS
    return Row(name, best_of(program, q, k, v, d_out, repeats=repeats), temp, operations / rate)


def ours(mask: masks.Mask, tokens: Tokens) -> Callable:
    return lambda q, k, v: attention(q, k, v, mask=mask, q_tokens=tokens, k_tokens=tokens)


def causal(length: int, rate: float) -> list[Row]:
    tokens, mask, pairs = Tokens.arange(1, length), masks.causal(), length * (length + 1) / 2
    rows = [
        measure("striate", ours(mask, tokens), length, pairs, rate),
        measure("striate, every block", ours(Unskipped(mask), tokens), length, pairs, rate),
    ]

    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")

    rows.append(measure("jax.nn.dot_product_attention", plain, length, pairs, rate, repeats=2))
    try:
        import tokamax
    except ImportError:
        return rows

    def chunked(q, k, v):
        return tokamax.dot_product_attention(q, k, v, is_causal=True, implementation="xla_chunked")

    return [*rows, measure("tokamax xla_chunked", chunked, length, pairs, rate, repeats=2)]


def packed(length: int, rate: float) -> list[Row]:
    lengths = np.random.default_rng(0).integers(DOCUMENT // 2, DOCUMENT * 3 // 2, size=2 * length // DOCUMENT)
    document = np.repeat(np.arange(len(lengths)), lengths)[None, :length].astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)])[document]
    position = (np.arange(length) - starts).astype(np.int32)
    tokens = Tokens(position=jnp.asarray(position), document=jnp.asarray(document))
    pairs = float((position + 1).sum())
    mask = masks.causal() & masks.same("document")
    whole = measure("causal, one document", ours(masks.causal(), Tokens.arange(1, length)), length, length**2 / 2, rate)
    return [measure(f"documents of ~{DOCUMENT}", ours(mask, tokens), length, pairs, rate), whole]


def tiles(length: int, rate: float) -> list[Row]:
    return tiles_of(masks.causal(), length, rate)


def band_tiles(length: int, rate: float) -> list[Row]:
    return tiles_of(masks.window(DOCUMENT - 1), length, rate)


def tiles_of(mask: masks.Mask, length: int, rate: float) -> list[Row]:
    rows, tokens = [], Tokens.arange(1, length)
    pairs = float(np.minimum(np.arange(length) + 1, DOCUMENT if mask.is_band else length).sum())
    for queries in (64, 128, 256, 512):
        for keys in (128, 256, 512, 1024):
            with mock.patch.object(Blockwise, "choose_tile", lambda *_, tile=(queries, keys): tile):
                rows.append(measure(f"{queries} x {keys}", ours(mask, tokens), length, pairs, rate))
    return rows


def show(title: str, rows: list[Row]) -> None:
    """A table in which every row is also a ratio to the first."""
    table = Table("", "seconds", "x first", "temp MB", "x first", "limit s", title=title, box=None)
    first = rows[0]
    for row in rows:
        ratios = row.seconds / first.seconds, row.temp_megabytes / first.temp_megabytes
        table.add_row(
            row.name,
            f"{row.seconds:.3f}",
            f"{ratios[0]:.2f}",
            f"{row.temp_megabytes:.0f}",
            f"{ratios[1]:.1f}",
            f"{row.limit_seconds:.3f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = {
        "causal": (causal, 8192),
        "packed": (packed, 16384),
        "tiles": (tiles, 8192),
        "band-tiles": (band_tiles, 16384),
    }
    parser.add_argument("cases", nargs="*", default=["causal", "packed"], metavar="CASE", help=", ".join(cases))
    parser.add_argument("--length", type=int, help="tokens, instead of 8192 (packed: 16384)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rate, figures = matrix_rate(), {}
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, matrix product {rate / 1e9:.0f} GFLOP/s")
    for name in arguments.cases:
        function, length = cases[name][0], arguments.length or cases[name][1]
        rows = function(length, rate)
        show(f"{name}: {HEADS} heads of {WIDTH}, {length} tokens, float32, forward + backward", rows)
        figures[name] = {"length": length, "rate": rate, "rows": [asdict(row) for row in rows]}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
