"""Kinds of attention on this machine's default device, as ratios against the best of their rivals in one run.

    python benchmarks/kinds.py [causal window packed prefix softcap alibi] [--length 2048 8192 32768] [--json FILE]

Rivals: jax.nn.dot_product_attention (xla), tokamax's xla_chunked (where tokamax is installed), and softmax written out.
What a rival has an argument for it gets by that argument; the rest by a dense mask or bias, made inside its program.
A rival whose program allocates more than the memory given does not fit, and is not run.

Each table has the seconds of every one, ours first, and how many times slower or larger the best rival is: above 1
striate is ahead. float32, 4 heads of 64, but 1 head at 32768.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from attention import best_of, matrix_rate
from rich.console import Console
from rich.table import Table

from striate.lib import masks, scores
from striate.lib.attention import attention
from striate.lib.scores import Score
from striate.lib.tokens import Tokens

WIDTH, WINDOW, PREFIX, CAP = 64, 1024, 256, 50.0


class Kind(NamedTuple):
    """One kind of attention, in our words and in those of the others."""

    mask: str
    score: Callable[[int], Score] = lambda heads: scores.plain()
    arguments: dict = {"is_causal": True}  # noqa: RUF012
    dense: bool = False  # whether others need the mask as an array
    cap: float | None = None
    slopes: bool = False


KINDS = {
    "causal": Kind("causal()"),
    "window": Kind(f"window({WINDOW - 1})", arguments={"is_causal": True, "local_window_size": (WINDOW - 1, 0)}),
    "packed": Kind("causal() & same('document')", arguments={}, dense=True),
    "prefix": Kind(f"causal() | key('position', None, {PREFIX - 1})", arguments={}, dense=True),
    "softcap": Kind("causal()", lambda heads: scores.softcap(CAP), cap=CAP),
    "alibi": Kind("causal()", lambda heads: scores.alibi(scores.alibi_slopes(heads)), slopes=True),
}


class Figure(NamedTuple):
    """Seconds and megabytes of temporaries of one program; None where it does not fit or cannot."""

    name: str
    seconds: float | None
    megabytes: float | None


def make_tokens(length: int) -> Tokens:
    """Documents of 512 to 1535 tokens."""
    lengths = np.random.default_rng(0).integers(512, 1536, size=2 * length // 512)
    document = np.repeat(np.arange(len(lengths)), lengths)[None, :length].astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)])[document]
    return Tokens(position=jnp.asarray(np.arange(length) - starts, jnp.int32), document=jnp.asarray(document))


def programs(name: str, kind: Kind, length: int, heads: int) -> dict[str, Callable]:
    """Every way to compute this kind of attention: (q, k, v) -> out."""
    tokens = make_tokens(length) if name == "packed" else Tokens.arange(1, length)
    mask, score = masks.parse(kind.mask), kind.score(heads)

    def ours(q, k, v):
        return attention(q, k, v, mask=mask, score=score, q_tokens=tokens)

    def shown():
        return mask.dense(tokens, tokens)[:, None]

    def bias():
        away = jnp.abs(jnp.arange(length)[:, None] - jnp.arange(length)[None])
        return -(scores.alibi_slopes(heads)[:, None, None] * away[None])[None].astype(jnp.float32)

    def given():
        extra = {"mask": shown()} if kind.dense else {}
        return {**kind.arguments, **extra, **({"bias": bias()} if kind.slopes else {})}

    def dense(q, k, v):
        logits = jnp.einsum("bthd,bshd->bhts", q, k) * WIDTH**-0.5
        logits = kind.cap * jnp.tanh(logits / kind.cap) if kind.cap else logits
        logits = logits + bias() if kind.slopes else logits
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(shown(), logits, -1e30)), v)

    found = {"striate": ours, "written out": dense}
    if not kind.cap:
        found["jax.nn"] = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="xla", **given())
    try:
        import tokamax
    except ImportError:
        return found
    cap = {"logits_soft_cap": kind.cap} if kind.cap else {}
    found["tokamax"] = lambda q, k, v: tokamax.dot_product_attention(
        q, k, v, implementation="xla_chunked", **given(), **cap
    )
    return found


def measure(name: str, attend: Callable, arrays, backward: bool, memory: float) -> Figure:
    """One program: forward, or forward and backward. `memory` in bytes."""
    q, k, v, d_out = arrays

    def both(q, k, v):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(d_out)

    try:
        program = jax.jit(both if backward else attend).lower(q, k, v).compile()
    except NotImplementedError:
        return Figure(name, None, None)
    temporaries = program.memory_analysis().temp_size_in_bytes
    if temporaries > memory:
        return Figure(name, None, temporaries / 1e6)
    return Figure(name, best_of(program, q, k, v, repeats=repeats(q)), temporaries / 1e6)


def repeats(q) -> int:
    return {2048: 10, 8192: 2}.get(q.shape[1], 1)


def run(name: str, length: int, memory: float) -> list[tuple[bool, list[Figure]]]:
    """(whether backward too, the figures, ours first), for the forward pass and for both."""
    heads = 4 if length < 32768 else 1
    arrays = [jax.random.normal(key, (1, length, heads, WIDTH)) for key in jax.random.split(jax.random.key(0), 4)]
    ways = programs(name, KINDS[name], length, heads)
    return [(both, [measure(n, f, arrays, both, memory) for n, f in ways.items()]) for both in (False, True)]


def row(name: str, length: int, backward: bool, figures: list[Figure]) -> list[str]:
    """What was measured, our seconds, the best rival's over ours, our memory, the least rival's over ours."""
    (_, seconds, megabytes), *rivals = figures
    fastest = min((x for x in rivals if x.seconds), key=lambda x: x.seconds, default=None)
    smallest = min((x for x in rivals if x.seconds), key=lambda x: x.megabytes, default=None)
    best = [f"{fastest.seconds / seconds:.2f}x", fastest.name] if fastest else ["", "none fits"]
    least = f"{smallest.megabytes / megabytes:.1f}x" if smallest else ""
    what = [name, str(length), "both" if backward else "forward"]
    return [*what, f"{seconds:.3f}", *best, f"{megabytes:.1f}", least]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=[*KINDS], metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--length", type=int, nargs="*", default=[2048, 8192, 32768])
    parser.add_argument("--memory", type=float, default=12.0, help="gigabytes that a program may allocate")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, matrix product {matrix_rate() / 1e9:.0f} GFLOP/s")
    table, found, console = (
        Table("kind", "length", "pass", "s", "rival", "", "temp MB", "rival", box=None),
        [],
        Console(),
    )
    for length in arguments.length:
        for name in arguments.kinds:
            for backward, figures in run(name, length, arguments.memory * 1e9):
                cells = row(name, length, backward, figures)
                table.add_row(*cells)
                console.print(" ".join(cells), style="dim")
                found.append({"kind": name, "length": length, "backward": backward})
                found[-1]["figures"] = [figure._asdict() for figure in figures]
                if arguments.json:
                    arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    console.print(table)


if __name__ == "__main__":
    main()
