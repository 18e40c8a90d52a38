"""Kinds of attention on this machine's default device, as ratios against the best of their rivals in one run.

    python benchmarks/kinds.py [causal window packed prefix softcap alibi] [--length 2048 8192 32768] [--json FILE]

Rivals: jax.nn.dot_product_attention (xla), tokamax's xla_chunked (where tokamax is installed), and softmax written out.
What a rival has an argument for it gets by that argument; the rest by a dense mask or bias, made inside its program.
A rival whose program allocates more than the memory given does not fit, and is not run.

The table has our seconds, and how many times slower or larger the best rival is: above 1 striate is ahead. All take
turns, so that what else the machine does meets them alike, and the best turn of each counts; a rival that is half as
slow again as the best one in the first turn takes no other. float32, 4 heads of 64, but 1 head at 32768.
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
OURS = "striate"
TURNS = {2048: 12, 8192: 5}  # by length; longer ones get a single one, without a warm-up


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

    found = {OURS: ours, "written out": dense}
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


def measure(ways: dict[str, Callable], arrays, backward: bool, memory: float) -> list[Figure]:
    """All programs in turn: forward, or forward and backward. `memory` in bytes."""
    *qkv, d_out = arrays
    compiled = {name: build(attend, qkv, d_out if backward else None) for name, attend in ways.items()}
    sizes = {name: x and x.memory_analysis().temp_size_in_bytes for name, x in compiled.items()}
    seconds = {name: [] for name, x in compiled.items() if x and sizes[name] <= memory}
    turns = TURNS.get(qkv[0].shape[1], 1)
    for turn in range(turns):
        least = min((x[0] for name, x in seconds.items() if x and name != OURS), default=0.0)
        for name, found in seconds.items():
            if name == OURS or not turn or found[0] <= 1.5 * least:  # the best rival is most likely among these
                found.append(best_of(compiled[name], *qkv, repeats=1, warm=turn == 0 < turns - 1))
    megabytes = {name: size and size / 1e6 for name, size in sizes.items()}
    return [Figure(name, min(seconds.get(name, ()), default=None), megabytes[name]) for name in ways]


def build(attend: Callable, qkv, d_out=None):
    """The compiled forward pass, or both where there is a d_out; None where it is not implemented."""

    def both(q, k, v):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(d_out)

    try:
        return jax.jit(attend if d_out is None else both).lower(*qkv).compile()
    except NotImplementedError:
        return None


def run(name: str, length: int, memory: float) -> list[tuple[bool, list[Figure]]]:
    """(whether backward too, the figures, ours first), for the forward pass and for both."""
    heads = 4 if length < 32768 else 1
    arrays = [jax.random.normal(key, (1, length, heads, WIDTH)) for key in jax.random.split(jax.random.key(0), 4)]
    ways = programs(name, KINDS[name], length, heads)
    return [(both, measure(ways, arrays, both, memory)) for both in (False, True)]


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
