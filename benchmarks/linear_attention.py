"""Linear attention on this machine's default device: what a token costs at any length, and where softmax costs more.

    striate bench linear-attention [--longest 262144] [--json FILE]

Forward + backward, 4 heads of 64, float32, in the order of the table: the sum rule without a decay, with one a token
and with one a channel, the delta rule, and, up to --softmax tokens, striate.attention under a causal mask in the same
run. A row is a length; its cells are microseconds a token, the fastest of a few calls. The last lines give how flat
the cost is, the length from which linear attention is the faster one, and how much faster it is at the longest that
softmax was measured at.

The limit is the time of the products of the chunks alone (2-linear: 2 (C (D + V) + 2 D V) forward and twice that and
what is computed again backward, for each token and head), at the rate of a large product measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from striate.lib import masks
from striate.lib.attention import attention
from striate.lib.linear_attention import CHUNK, linear_attention

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


def seconds(function: Callable, length: int) -> float:
    """Of forward + backward: the fastest of calls that take two seconds together, and of two at least."""
    x = arrays(length)
    run = jax.jit(jax.grad(lambda x: (function(x) ** 2).sum()))
    jax.block_until_ready(run(x))
    taken = []
    while len(taken) < 2 or (sum(taken) < 2 and len(taken) < 20):
        start = time.perf_counter()
        jax.block_until_ready(run(x))
        taken.append(time.perf_counter() - start)
    return min(taken)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=262_144, help="tokens")
    parser.add_argument("--softmax", type=int, default=32_768, help="tokens, at most, of softmax attention")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    console, rows, length = Console(width=120), [], SHORTEST
    with console.status("") as status:
        while length <= arguments.longest:
            row = {"length": length}
            for name in (*RULES, "softmax"):
                if name != "softmax" or length <= arguments.softmax:
                    status.update(f"{length} tokens, {name}")
                    row[name] = seconds(softmax if name == "softmax" else linear(name), length) / length
            rows.append(row)
            length *= 2
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
    if arguments.json:
        arguments.json.write_text(json.dumps({"heads": HEADS, "width": WIDTH, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
