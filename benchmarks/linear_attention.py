"""Linear attention on this machine's default device: what a token costs at any length, and where softmax costs more.

    striate bench linear-attention [--json FILE]
    python benchmarks/linear_attention.py [--longest 262144] [--softmax 32768] [--rounds 6] [--png FILE]

Forward + backward, 4 heads of 64, float32, in the order of the table: the sum rule without a decay, with one a token
and with one a channel, the delta rule, and, up to --softmax tokens, striate.attention under a causal mask in the same
run. A row is a length; its cells are microseconds a token, of the fastest of some rounds over all lengths. Of each
length a round takes as many calls as make --longest tokens: the fastest of many short calls would be compared with
a long one, which no quiet moment of the machine holds. The last lines give how flat the cost is, the length from which
linear attention is the faster one, and how much faster it is at the longest that softmax was measured at.

Under Linux it starts itself again with ALLOCATOR, which says how glibc gets memory. Without, arrays of more than 32 MB
are mapped afresh in every call, in pages of 4 KB: 1.6 faults a token, a fifth of the time. What a token costs would
grow with the length, though not by what is computed. (Every program of long arrays on a CPU gains by it.)

The limit is the time of the products of the chunks alone (2-linear: 2 (C (D + V) + 2 D V) forward and twice that and
what is computed again backward, for each token and head), at the rate of a large product measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from matplotlib import pyplot
from rich.console import Console
from rich.progress import track
from rich.table import Table

from striate.lib import masks
from striate.lib.attention import attention
from striate.lib.linear_attention import CHUNK, linear_attention

# In huge pages, and what was freed is kept: nothing mapped by itself, nothing given back.
ALLOCATOR = "hugetlb=1 mmap_max=0 trim_threshold=1099511627776"
HEADS, WIDTH = 4, 64
SHORTEST = 2048
RULES = {"none": {}, "token": {}, "channel": {}, "delta": {"rule": "delta"}}


def arrays(length: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (1, length, HEADS, WIDTH)) * WIDTH**-0.5 for key in keys[:3])
    return {
        "q": q,
        "k": k / jnp.linalg.norm(k, axis=-1, keepdims=True),
        "v": v,
        "token": -jax.nn.softplus(jax.random.normal(keys[3], (1, length, HEADS))),
        "channel": -jax.nn.softplus(jax.random.normal(keys[4], (1, length, HEADS, WIDTH))),
    }


def linear(name: str) -> Callable:
    def run(x):
        log_decay = x["token"] if name == "delta" else x.get(name)
        return linear_attention(x["q"], x["k"], x["v"], log_decay=log_decay, **RULES[name])

    return run


def softmax(x):
    return attention(x["q"], x["k"], x["v"], mask=masks.causal())


@functools.cache
def program(name: str) -> Callable:
    """Forward + backward."""
    function = softmax if name == "softmax" else linear(name)
    return jax.jit(jax.grad(lambda x: (function(x) ** 2).sum()))


def seconds(name: str, length: int, calls: int) -> float:
    """Of a call, over so many of them."""
    x, run = arrays(length), program(name)
    jax.block_until_ready(run(x))
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(run(x))
    return (time.perf_counter() - start) / calls


def limit(chunk: int) -> float:
    """Seconds of a token: its products, at the rate of a large one."""
    size = 1024
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    start = time.perf_counter()
    for _ in range(10):
        a = product(a) * 1e-3
    jax.block_until_ready(a)
    rate = 10 * 2 * size**3 / (time.perf_counter() - start)
    forward = HEADS * 2 * (chunk * 2 * WIDTH + 2 * WIDTH**2)
    return 4 * forward / rate


def measure(arguments) -> list[dict[str, float]]:
    """A row for each length: seconds a token by name."""
    doublings = (arguments.longest // SHORTEST).bit_length()
    rows = [{"length": SHORTEST << doubling} for doubling in range(doublings)]
    names = [(row, name) for row in rows for name in RULES]
    names += [(row, "softmax") for row in rows if row["length"] <= arguments.softmax]
    for row, name in track(names * arguments.rounds, "measuring", transient=True):
        tokens = arguments.softmax if name == "softmax" else arguments.longest
        taken = seconds(name, row["length"], tokens // row["length"]) / row["length"]
        row[name] = min(taken, row.get(name, taken))
    return rows


def draw(rows: list[dict[str, float]], file: Path) -> None:
    """Microseconds a token over the length, both in powers of two."""
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for name in (*RULES, "softmax"):
        points = [(row["length"], 1e6 * row[name]) for row in rows if name in row]
        axes.plot(
            *zip(*points, strict=True),
            marker=".",
            label={"softmax": "softmax, causal", "none": "no decay"}.get(name, name),
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2, subs=[])
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds a token")
    axes.yaxis.set_major_formatter(pyplot.FormatStrFormatter("%g"))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=262_144, help="tokens")
    parser.add_argument("--softmax", type=int, default=32_768, help="tokens, at most, of softmax attention")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rounds", type=int, default=6, help="over all lengths, two minutes and a half each")
    parser.add_argument("--png", type=Path, help="also draw them here")
    arguments = parser.parse_args()
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{setting}" for setting in ALLOCATOR.split())
        os.execv(sys.executable, [sys.executable, *sys.argv])
    console, rows = Console(width=120), measure(arguments)
    shown = Table("tokens", *RULES, "softmax, causal", title="microseconds a token, forward + backward", box=None)
    for row in rows:
        cells = (f"{1e6 * row[name]:.2f}" if name in row else "" for name in (*RULES, "softmax"))
        shown.add_row(f"{row['length']:,}", *cells)
    console.print(shown)
    for name in RULES:
        costs, both = [row[name] for row in rows], [row for row in rows if "softmax" in row]
        ahead = [row["length"] for row in both if row["softmax"] > row[name]]
        last = both[-1]
        console.print(
            f"{name}: {max(costs) / min(costs) - 1:.0%} between the dearest and the cheapest length; faster than "
            f"softmax from {min(ahead, default=0):,} tokens, {last['softmax'] / last[name]:.1f} times at "
            f"{last['length']:,}."
        )
    console.print(f"limit of a token without a decay: {1e6 * limit(CHUNK['plain']):.2f} microseconds")
    if arguments.png:
        draw(rows, arguments.png)
    if arguments.json:
        arguments.json.write_text(json.dumps({"heads": HEADS, "width": WIDTH, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
