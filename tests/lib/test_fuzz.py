"""Random problems of every kind at once: formulas, Tokens, scores, heads, widths, lengths, layouts, meshes, strategies.

`PYTHONPATH=tests python tests/lib/test_fuzz.py FIRST COUNT [IMPLEMENTATION]` runs as many as you like and says what it
has seen.
"""

import collections
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emulator import COMPILER, emulated
from oracles import scores as score_oracle
from oracles.formulas import as_columns, as_rows, random_formula, random_tokens
from striate.lib import masks
from striate.lib.layouts import Contiguous, Striped, ZigZag
from striate.lib.parallel import AllGather, Ring, RingUlysses, Ulysses
from suites.attention import Problem, System, check_score, mesh, random_problem

HEADS = ((1, 1), (2, 1), (4, 2), (4, 4), (6, 3), (8, 1), (8, 4))  # of queries and of keys


class Drawn(NamedTuple):
    """One random problem and the system that has to solve it."""

    system: System
    mask: masks.Mask
    case: score_oracle.Case
    problem: Problem
    shown: np.ndarray  # (B, H, T, S), from the formula as it was written
    tile: int

    def check(self) -> None:
        check_score(self.system, self.mask, self.case, self.problem, self.shown, self.tile)


SHARE = 20  # problems in a row have the same shapes and system, so that what is computed step by step compiles once


def draw(seed: int) -> Drawn:
    rng, shapes = np.random.default_rng(seed), np.random.default_rng([seed // SHARE, 1])
    heads, kv_heads = HEADS[shapes.integers(len(HEADS))]
    system = _system(shapes, heads)
    batch, unit = int(shapes.integers(1, 4)), system.layout.unit if system.layout else 1
    length, keys = (unit * int(shapes.integers(1, max(96 // unit, 1) + 1)) for _ in range(2))
    width, value_width = (int(x) for x in shapes.choice([1, 3, 8, 12, 16], size=2))
    dtype, tile = "bfloat16" if shapes.random() < 0.15 else "float32", int(shapes.choice([8, 16, 24]))
    own_keys = shapes.random() < 0.4

    # Ulysses deals the heads of one formula, which are any number of them where they differ.
    differ = rng.random() < 0.3 and not isinstance(system.parallel, Ulysses)
    formula = random_formula(rng, depth=int(rng.integers(5)), heads=heads if differ else None)
    tokens = random_tokens(rng, batch, length), random_tokens(rng, batch, keys) if own_keys else None
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width, "value_width": value_width, "dtype": dtype}
    problem = random_problem(rng, *tokens, **sizes)
    cases = score_oracle.all_cases(rng, heads)
    case = cases[rng.integers(len(cases))] if rng.random() < 0.7 else cases[0]
    return Drawn(system, formula.mask, case, problem, _shown(formula, problem), tile)


def _system(rng, heads: int) -> System:
    """One device, or several: a strategy that the heads allow, over 1, 2, 4 or 8 shards in some order."""
    shards = int(rng.choice([1, 2, 4, 8]))
    if shards == 1 and rng.random() < 0.7:
        return System("xla")
    parallel = [Ring(mesh(sequence=shards)), Ring(mesh(sequence=shards)), AllGather(mesh(sequence=shards))]
    if heads % shards == 0:
        parallel.append(Ulysses(mesh(sequence=shards)))
    if shards > 2 and heads % 2 == 0:
        parallel.append(RingUlysses(mesh(ring=shards // 2, sequence=2)))
    stripe = int(rng.integers(1, 12))
    layouts = Contiguous(shards), Striped(shards, 1), Striped(shards, stripe), ZigZag(shards)
    return System(parallel=parallel[rng.integers(len(parallel))], layout=layouts[rng.integers(len(layouts))])


def _shown(formula, problem: Problem) -> np.ndarray:
    (batch, length, heads, _), keys = problem.q.shape, problem.k.shape[1]
    visible = formula.visible(as_columns(problem.q_tokens), as_rows(problem.k_tokens))  # heads first, where they differ
    return np.broadcast_to(visible, (heads, batch, length, keys)).swapaxes(0, 1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100))
def test_random_problems(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 20))
def test_many_random_problems(first):
    for seed in range(first, first + 20):
        check(seed)
    jax.clear_caches()  # see conftest.py: a module of 2000 problems is too many for one process


@pytest.mark.long
@pytest.mark.parametrize("seed", range(0, 120, SHARE))
def test_random_problems_on_the_tpu_kernel(seed):
    check(seed, "pallas_tpu_interpret")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3000, 4000, SHARE // 2))
def test_many_random_problems_on_the_tpu_kernel(seed):
    check(seed, "pallas_tpu_interpret")
    jax.clear_caches()


@pytest.mark.gpu
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler in PATH")
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(4000, 4600, SHARE))])
def test_random_problems_on_the_compiled_gpu_kernel(seed):
    with emulated(seed):
        check(seed, "pallas_gpu")


def check(seed: int, implementation: str | None = None) -> Drawn:
    drawn = draw(seed)
    if implementation == "pallas_gpu":  # which takes no float32
        narrow = {name: getattr(drawn.problem, name).astype(jnp.bfloat16) for name in ("q", "k", "v", "d_out")}
        drawn = drawn._replace(problem=drawn.problem._replace(**narrow))
    drawn = drawn._replace(system=drawn.system._replace(implementation=implementation or drawn.system.implementation))
    try:
        drawn.check()
    except Exception as error:
        error.add_note(f"seed {seed}: {drawn.system}, {drawn.mask}, {drawn.case.name}, {drawn.problem.q.shape}")
        raise
    return drawn


def main(first: int, count: int, implementation: str | None = None) -> None:
    seen, start, failed = collections.Counter(), time.perf_counter(), []
    for seed in range(first, first + count):
        try:
            drawn = check(seed, implementation)
        except Exception as error:
            failed.append(seed)
            print(f"failed: {error!r}", *error.__notes__, flush=True)
            continue
        seen[type(drawn.system.parallel).__name__, drawn.system.shards] += 1
        seen[drawn.case.name] += 1
        seen["switches per head"] += drawn.mask.heads is not None
        seen["rows that see nothing"] += not drawn.shown.any(-1).all()
        seen["nothing or everything visible"] += drawn.shown.mean() in (0, 1)
        if (seed + 1 - first) % 50 == 0:
            print(f"{seed + 1 - first} of {count}, {time.perf_counter() - start:.0f} s", flush=True)
            jax.clear_caches()
    for what, times in sorted(seen.items(), key=str):
        print(times, what)
    if failed:
        sys.exit(f"{len(failed)} of {count} failed: seeds {failed}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])
