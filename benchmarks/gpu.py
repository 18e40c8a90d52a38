"""Exact attention on one GPU (H100, H200): whether it is right, then how fast it is beside what others offer.

    python benchmarks/gpu.py [right reruns causal masks ring decode] [--json FILE] [--tiny]

right: results and gradients by the rule of tests/suites/attention.py (float64 on the host), masks x widths x dtypes.
reruns: 250 forward passes of one problem, equal to the bit.
causal: bfloat16, 16 heads, D = 128 up to 32k tokens, D = 64 and 256 at 8k, forward and backward: TFLOP/s beside cuDNN
(jax.nn.dot_product_attention) and, where torch is installed, its scaled_dot_product_attention; "equal reruns" is ours
with the backward pass whose sums have one order.
masks: at 32k a window of 1024, documents of 2k, a prefix, softcap and ALiBi, beside FlexAttention where torch is.
ring: 256k tokens on 8 devices that are one after the other this one: every pair of shards is timed alone, and a step
takes as long as its slowest device; striped and zigzag against contiguous, and each against one kernel for all.
decode: one query for each of 16 rows, 32 heads for 8 of keys, a cache of 64k tokens: share of the measured bandwidth;
the keys in one piece, then in pages of 64 tokens that lie anywhere.

Every part is written to FILE as soon as it is done; one that fails leaves its error there, and the others go on. The
limit beside the figures is the rate of a large product of matrices, measured in the same run. Nothing outside this
repository is needed but jax with CUDA, and pytest for the first part. --tiny goes through all parts in the interpreter,
with figures that say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("STRIATE_EXPERIMENTAL", "pallas_gpu")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import jax
import jax.numpy as jnp
import numpy as np

from striate import Tokens, masks, scores
from striate.lib.attention import attention
from striate.lib.decoding.paging import paged_attention
from striate.lib.layouts import Contiguous, Striped, ZigZag

SHAPES = [("bfloat16", 64, 64), ("bfloat16", 128, 128), ("float16", 128, 128)]
SHAPES += [("bfloat16", 192, 128), ("bfloat16", 80, 96), ("bfloat16", 256, 256)]
HEADS, DOCUMENT, WINDOW, DEVICES = 16, 2048, 1024, 8
EQUAL_RERUNS = "--xla_gpu_deterministic_ops=true"


def seconds(function: Callable, *arrays, least: float = 0.2) -> float:
    """Of a call, over so many that they take `least` seconds, after two that do not count."""
    for _ in range(2):
        jax.block_until_ready(function(*arrays))
    calls, taken = 1, 0.0
    while taken < least:
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arrays)
        jax.block_until_ready(result)
        taken, calls = time.perf_counter() - start, 2 * calls
    return 2 * taken / calls


def arrays(length: int, width: int, heads: int = HEADS, seed: int = 0) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, (1, length, heads, width), jnp.bfloat16) for key in keys]


class Case(NamedTuple):
    """One attention to be timed. `flags` is XLA_FLAGS while it is traced."""

    attend: Callable
    given: list
    pairs: float
    flags: str = ""

    def lowered(self) -> list:
        """Its first pass, and both."""

        def both(q, k, v, d_out):
            return jax.vjp(self.attend, q, k, v)[1](d_out)

        with mock.patch.dict(os.environ, XLA_FLAGS=self.flags):
            return [jax.jit(self.attend).lower(*self.given[:3]), jax.jit(both).lower(*self.given)]

    def rates(self, programs: list) -> dict[str, float]:
        """Of the backward pass as the time of both less that of the first."""
        forward, both = (program.result() for program in programs)
        one = seconds(forward, *self.given[:3])
        taken = {"forward": one, "backward": seconds(both, *self.given) - one}
        return rates(taken, self.pairs, self.given[0].shape[3])


def timed(cases: dict[str, Case]) -> dict[str, dict[str, float] | str]:
    """Their rates, one after the other, when all were compiled side by side."""
    found = {name: attempt(case.lowered) for name, case in cases.items()}
    with ThreadPoolExecutor() as pool:
        programs = {name: [pool.submit(x.compile) for x in both] for name, both in found.items() if type(both) is list}
    return found | {name: attempt(cases[name].rates, compiled) for name, compiled in programs.items()}


def rates(taken: dict[str, float], pairs: float, width: int) -> dict[str, float]:
    """TFLOP/s: two products of a visible pair forward, five backward."""
    products = {"forward": 2, "backward": 5}
    return {way: products[way] * 2 * pairs * width * HEADS / taken[way] / 1e12 for way in taken}


class Parts:
    """The measurements. Each gives what is written of it."""

    def __init__(self, tiny: bool):
        self.tiny = tiny
        self.name = "pallas_gpu_interpret" if tiny else "pallas_gpu"
        self.rival = "xla" if tiny else "cudnn"

    def ours(self, mask, score=None, tokens=None) -> Callable:
        def attend(q, k, v):
            return attention(q, k, v, mask=mask, score=score, q_tokens=tokens, implementation=self.name)

        return attend

    def right(self) -> dict:
        from suites.attention import RULE, System, check_bound, formulas, random_problem, solve

        problems, system = {}, System(self.name)
        for dtype, width, value_width in SHAPES[: 1 if self.tiny else None]:
            for mask in (masks.causal(), RULE, masks.everything(), masks.window(70))[: 1 if self.tiny else None]:
                rng = np.random.default_rng(width)
                tokens = formulas.random_tokens(rng, batch=2, length=64 if self.tiny else 500)
                shape = {"heads": 4, "kv_heads": 2, "width": width, "value_width": value_width}
                problems[f"{dtype} {width} {value_width} {mask}"] = (
                    mask,
                    random_problem(rng, tokens, dtype=dtype, **shape),
                )
        with ThreadPoolExecutor() as pool:  # compiled side by side, and kept for the checks
            list(pool.map(lambda problem: attempt(solve, system, *problem), problems.values()))
        # What one problem shows must not hide the others.
        said = {
            name: attempt(check_bound, system, *problem) or "within the bound" for name, problem in problems.items()
        }
        return {"problems": said, "right": set(said.values()) == {"within the bound"}}

    def reruns(self) -> dict:
        given, times = arrays(128 if self.tiny else 4096, 128, heads=2)[:3], 2 if self.tiny else 250
        attend = jax.jit(self.ours(masks.causal()))
        first = np.asarray(attend(*given)).view(np.uint16)
        equal = sum(np.array_equal(np.asarray(attend(*given)).view(np.uint16), first) for _ in range(times))
        return {"reruns": times, "equal to the bit": equal}

    def causal(self) -> dict:
        shapes = [(128, 64)] if self.tiny else [(2**n * 1024, 128) for n in (2, 3, 4, 5)] + [(8192, 64), (8192, 256)]
        cases, pairs = {}, {length: length * (length + 1) / 2 for length, _ in shapes}
        for length, width in shapes:
            given, ours = arrays(length, width, heads=1 if self.tiny else HEADS), self.ours(masks.causal())
            cases[f"striate, {length} x {width}"] = Case(ours, given, pairs[length])
            cases[f"{self.rival}, {length} x {width}"] = Case(self._dot_product, given, pairs[length])
            cases[f"equal reruns, {length} x {width}"] = Case(ours, given, pairs[length], EQUAL_RERUNS)
        found = {"matrix rate": matrix_rate(), **timed(cases)}
        for length, width in () if self.tiny else shapes:
            found[f"torch, {length} x {width}"] = attempt(torch_causal, length, width, pairs[length])
        return found

    def _dot_product(self, q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=self.rival)

    def masks(self) -> dict:
        length, width = (128, 64) if self.tiny else (32768, 128)
        index = np.arange(length, dtype=np.int32)[None]
        tokens = Tokens(
            position=index, document=index // min(DOCUMENT, length // 2), prefix=np.int32(index < length // 4)
        )
        slopes = scores.alibi_slopes(1 if self.tiny else HEADS)
        cases = {
            "causal": (masks.causal(), None),
            "window": (masks.window(min(WINDOW, length // 4) - 1), None),
            "documents": (masks.causal() & masks.same("document"), None),
            "prefix": (masks.causal() | masks.prefix(), None),
            "softcap": (masks.causal(), scores.softcap(50.0)),
            "alibi": (masks.causal(), scores.alibi(slopes)),
        }
        given = arrays(length, width, heads=1 if self.tiny else HEADS)
        pairs = {name: visible_pairs(mask, tokens) for name, (mask, _) in cases.items()}
        found = timed(
            {f"striate, {name}": Case(self.ours(*case, tokens), given, pairs[name]) for name, case in cases.items()}
        )
        for name in () if self.tiny else cases:
            found[f"flex, {name}"] = attempt(flex, name, length, width, slopes, pairs[name])
        return found

    def ring(self) -> dict:
        devices, length, stripe = (2, 256, 32) if self.tiny else (DEVICES, 2**18, 128)
        q, k, v, _ = arrays(length, 128, heads=1)
        whole = seconds(jax.jit(self.ours(masks.causal(), tokens=Tokens.arange(1, length))), q, k, v)
        layouts = Contiguous(devices), Striped(devices, stripe), ZigZag(devices)
        found = {"one kernel": whole}

        @jax.jit
        def of_shards(q, k, v, q_tokens, k_tokens):
            how = {"q_tokens": q_tokens, "k_tokens": k_tokens, "implementation": self.name}
            return attention(q, k, v, mask=masks.causal(), **how)

        for layout in layouts:
            permuted = layout.permute((q, k, v, Tokens.arange(1, length)))
            runs = [slice(start, start + length // devices) for start in range(0, length, length // devices)]
            shards = [jax.tree.map(lambda x, run=run: x[:, run], permuted) for run in runs]
            work = np.zeros((devices, devices))  # [step, device]
            for step, device in np.ndindex(*work.shape):
                own_q, _, _, q_tokens = shards[device]
                _, *keys_and_values, k_tokens = shards[(device - step) % devices]
                work[step, device] = seconds(of_shards, own_q, *keys_and_values, q_tokens, k_tokens, least=0.02)
            makespan = work.max(axis=1).sum()
            found[str(layout)] = {"makespan": makespan, "share of one kernel's rate": whole / devices / makespan}
        contiguous = found[str(layouts[0])]["makespan"]
        for layout in layouts[1:]:
            found[str(layout)]["times faster than contiguous"] = contiguous / found[str(layout)]["makespan"]
        return found

    def decode(self) -> dict:
        batch, length, kv_heads, width, page = (2, 256, 2, 64, 64) if self.tiny else (16, 65536, 8, 128, 64)
        keys = jax.random.split(jax.random.key(0), 3)
        q = jax.random.normal(keys[0], (batch, 1, 4 * kv_heads, width), jnp.bfloat16)
        k, v = (jax.random.normal(key, (batch, length, kv_heads, width), jnp.bfloat16) for key in keys[1:])
        k_tokens, at = Tokens.arange(batch, length), np.full((batch, 1), length - 1, np.int32)
        how = {"q_tokens": Tokens(position=at), "mask": masks.causal(), "implementation": self.name}
        places = np.random.default_rng(0).permutation(batch * length // page).reshape(batch, -1).astype(np.int32)

        @jax.jit
        def one_piece(q, k, v):
            return attention(q, k, v, k_tokens=k_tokens, **how)

        @jax.jit
        def in_pages(q, k, v):
            pages = (x.reshape(-1, page, kv_heads, width) for x in (k, v))
            return paged_attention(q, *pages, places, k_tokens=k_tokens, **how)

        # Read and written.
        bandwidth = 2 * k.nbytes / seconds(jax.jit(lambda x: x + 1), k)
        found, size = {"bandwidth, GB/s": bandwidth / 1e9}, k.nbytes + v.nbytes
        for name, attend in {"one piece": one_piece, f"pages of {page}": in_pages}.items():
            rate = size / seconds(attend, q, k, v)
            found[name] = {"GB/s": rate / 1e9, "share": rate / bandwidth}
        return found


def attempt(measure: Callable, *arguments):
    try:
        return measure(*arguments)
    except Exception as error:  # one rival that is not there must not end the run
        return f"{type(error).__name__}: {error}"[:300]


def matrix_rate() -> float:
    """TFLOP/s of a product of two 8192 x 8192 matrices in bfloat16."""
    size = 8192 if jax.default_backend() == "gpu" else 256
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    return 2 * size**3 / seconds(jax.jit(jnp.matmul), x, x) / 1e12


def visible_pairs(mask, tokens) -> float:
    """Pairs that the mask shows, block by block of queries."""
    step, total = 1024, 0
    for start in range(0, tokens.shape[1], step):
        rows = jax.tree.map(lambda x, start=start: x[:, start : start + step], tokens)
        total += int(mask.dense(rows, tokens).sum())
    return float(total)


def torch_causal(length: int, width: int, pairs: float) -> dict[str, float]:
    """TFLOP/s of torch's own."""
    import torch

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return rates(torch_seconds(attend, length, width), pairs, width)


def flex(case: str, length: int, width: int, slopes, pairs: float) -> dict[str, float]:
    """TFLOP/s of FlexAttention under the same mask or score."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    slope, quarter = torch.tensor(slopes, device="cuda"), length // 4
    shown = {
        "window": lambda b, h, q, k: (q >= k) & (q - k < WINDOW),
        "documents": lambda b, h, q, k: (q >= k) & (q // DOCUMENT == k // DOCUMENT),
        "prefix": lambda b, h, q, k: (q >= k) | ((q < quarter) & (k < quarter)),
    }.get(case, lambda b, h, q, k: q >= k)
    score = {
        "softcap": lambda s, b, h, q, k: 50.0 * torch.tanh(s / 50.0),
        "alibi": lambda s, b, h, q, k: s - slope[h] * (q - k).abs(),
    }.get(case)
    block_mask, compiled = create_block_mask(shown, None, None, length, length), torch.compile(flex_attention)
    taken = torch_seconds(lambda q, k, v: compiled(q, k, v, score_mod=score, block_mask=block_mask), length, width)
    return rates(taken, pairs, width)


def torch_seconds(attend: Callable, length: int, width: int) -> dict[str, float]:
    import torch

    shape = (1, HEADS, length, width)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    d_out = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def timed(function, calls: int = 10) -> float:
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    forward = timed(lambda: attend(q, k, v))
    both = timed(lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), d_out))
    return {"forward": forward, "backward": both - forward}


def show(part: str, found: dict, taken: float) -> None:
    print(f"\n{part}, {taken:.0f} s")
    for name, value in found.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        shown = (f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in rows)
        print(f"  {name:<40}", "   ".join(shown), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("right", "reruns", "causal", "masks", "ring", "decode")
    parser.add_argument("parts", nargs="*", default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--json", type=Path, help="write what was found here, part by part")
    parser.add_argument("--tiny", action="store_true", help="go through all of it in the interpreter")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    found = {"device": device.device_kind, "jax": jax.__version__}
    parts = Parts(arguments.tiny)
    for name in arguments.parts:
        start = time.perf_counter()
        try:
            found[name] = getattr(parts, name)()
        except Exception:
            found[name] = {"failed": traceback.format_exc(limit=-3)}
        taken = time.perf_counter() - start
        show(name, found[name], taken)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
