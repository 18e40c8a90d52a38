"""What exact attention has to satisfy, whatever computes it, on whatever mesh, in whatever order its tokens live."""

import contextlib
import functools
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import striate
from oracles import attention as oracle
from oracles import formulas
from oracles import scores as score_oracle
from striate import Tokens, masks, scores
from striate.lib import attention
from striate.lib.attention import Parallel
from striate.lib.layouts import Layout
from striate.lib.tiles import block_length
from striate.lib.tokens import PADDING

# No tile is longer, so that small problems have many.
TILE = 24
# Neither this nor its half, quarter or eighth is a multiple of the tile that it gets.
LENGTH = 208
# Reads every kind of field, keeps documents apart, and leaves queries that see nothing and keys that nobody sees.
RULE = masks.parse("causal() & same('document') & (window(40) | sink(3)) | prefix() & same('document')")
ORDERS = 8  # of the tokens, in which the dense reference is computed at most
# Of the greatest magnitude (oracles.attention.magnitudes): one unit in the last place of the float32 in which all is
# accumulated; for inputs of 16 bits a quarter of their unit, since two factors of the products are rounded to it.
# Gradients start from exp(t - lse) with lse rounded to float32, half a unit of |lse|, so they get as much more.
UNIT = float(jnp.finfo(jnp.float32).eps)
FLOOR = {"float32": UNIT, **{name: 0.25 * float(jnp.finfo(name).eps) for name in ("bfloat16", "float16")}}


class System(NamedTuple):
    """One way to compute attention: an implementation on one device, or spread over several in some token order."""

    implementation: str | None = None
    parallel: Parallel | None = None
    layout: Layout | None = None

    def __str__(self) -> str:
        if self.parallel is None:
            return self.implementation or "default"
        return f"{type(self.parallel).__name__}-{self.layout}"

    @property
    def shards(self) -> int:
        return self.parallel.shards if self.parallel else 1

    def permute(self, tree):
        return self.layout.permute(tree) if self.layout else tree

    def restore(self, tree):
        return self.layout.restore(tree) if self.layout else tree


REFERENCE = System("reference")
PLAIN = scores.plain()


class Problem(NamedTuple):
    """Arrays and Tokens in natural order, and the cotangents of both results. Shapes as in striate.attention."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_tokens: Tokens
    k_tokens: Tokens
    d_out: np.ndarray
    d_lse: np.ndarray


def mesh(kind=AxisType.Auto, **axes: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (kind,) * len(axes), devices=devices)


def random_problem(rng, q_tokens, k_tokens=None, *, dtype="float32", heads=4, kv_heads=2, width=16, value_width=8):
    """Normal arrays for the Tokens given; k_tokens are q_tokens where not given."""
    k_tokens = q_tokens if k_tokens is None else k_tokens

    def normal(*shape, dtype=dtype):
        return rng.normal(size=shape).astype(np.float32).astype(jnp.dtype(dtype))

    return Problem(
        q=normal(*q_tokens.shape, heads, width),
        k=normal(*k_tokens.shape, kv_heads, width),
        v=normal(*k_tokens.shape, kv_heads, value_width),
        q_tokens=q_tokens,
        k_tokens=k_tokens,
        d_out=normal(*q_tokens.shape, heads, value_width),
        d_lse=normal(*q_tokens.shape, heads, dtype=jnp.promote_types(dtype, "float32")),
    )


def solve(system: System, mask: masks.Mask, problem: Problem, tile=TILE, score=PLAIN) -> oracle.Truth:
    """Results and gradients as numpy, in natural order. Compiles once for each mask, system but layout, and shape."""
    # The dense form is sooner done operation by operation than compiled for each mask.
    run = _solve.__wrapped__ if system == REFERENCE else _solve
    solved, d_score = run(mask, system.implementation, system.parallel, tile, score, *system.permute(problem))
    return jax.tree.map(np.asarray, system.restore(solved)._replace(d_score=tuple(jax.tree.leaves(d_score))))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _solve(mask, implementation, parallel, tile, score, q, k, v, q_tokens, k_tokens, d_out, d_lse):
    how = {"implementation": implementation, "parallel": parallel, "return_lse": True}

    def attend(score, q, k, v):
        return striate.attention(q, k, v, mask=mask, score=score, q_tokens=q_tokens, k_tokens=k_tokens, **how)

    with small_tiles(implementation or "xla", tile):
        results, pull = jax.vjp(attend, score, q, k, v)
        d_score, *gradients = pull((d_out, d_lse))
        return oracle.Truth(*results, *gradients), d_score


def small_tiles(implementation: str, longest: int):
    """While this is entered, an implementation cuts lengths into tiles no longer than that."""

    if implementation == "pallas_gpu":  # its blocks are what the instructions of a GPU want
        return contextlib.nullcontext()
    tiled = attention._tiled(implementation)

    def cut(length: int) -> int:
        if "gpu" in implementation:  # two warpgroups share the rows of a tile, eight of them at least
            return block_length(length, max(longest, 32), 16)
        return length if length <= longest else block_length(length, longest, 8)

    def choose_tile(cls, mask, q, k):
        return cut(q.shape[1]), cut(k.shape[1])

    return mock.patch.object(tiled, "choose_tile", classmethod(choose_tile))


def visible(mask: masks.Mask, problem: Problem) -> np.ndarray:
    return np.asarray(mask.dense(problem.q_tokens, problem.k_tokens))


def truth(visible_BTS, problem: Problem, equations=oracle.attention) -> oracle.Truth:
    q, k, v, _, _, d_out, d_lse = problem
    return equations(q, k, v, visible_BTS, q.shape[-1] ** -0.5, d_out, d_lse)


def errors(got: oracle.Truth, true: oracle.Truth) -> dict[str, float]:
    """The greatest absolute error of each array; both have to agree on the rows that see nothing."""
    np.testing.assert_array_equal(np.isneginf(got.lse), np.isneginf(true.lse))
    got, true = (arrays(x._replace(lse=np.where(np.isneginf(x.lse), 0, x.lse))) for x in (got, true))
    return {name: float(np.abs(np.float64(got[name]) - true[name]).max()) for name in got}


def arrays(x: oracle.Truth) -> dict[str, np.ndarray]:
    named = {name: value for name, value in x._asdict().items() if name != "d_score"}
    return named | {f"parameter {number}": value for number, value in enumerate(x.d_score)}


def check_bound(system: System, mask: masks.Mask, problem: Problem, visible_BTS=None, tile=TILE) -> None:
    """error <= 2 x the error of the dense reference in the same dtype, plus the floor; for results and gradients."""
    visible_BTS = visible(mask, problem) if visible_BTS is None else visible_BTS
    true, sizes = truth(visible_BTS, problem), truth(visible_BTS, problem, oracle.magnitudes)
    check_errors(solve(system, mask, problem, tile), true, sizes, problem, reference_errors(mask, problem, true))


def check_score(system: System, mask: masks.Mask, case: score_oracle.Case, problem: Problem, shown, tile=TILE) -> None:
    """`check_bound` under a score, with the gradients of its parameters; `shown` is (B, T, S) or (B, H, T, S)."""
    shown, scale = oracle.by_head(shown), problem.q.shape[-1] ** -0.5
    true, sizes = (f(case, problem, shown, scale) for f in (score_oracle.attention, score_oracle.magnitudes))
    got, reference = solve(system, mask, problem, tile, case.score), reference_errors(mask, problem, true, case.score)
    check_errors(got, true, sizes, problem, reference)


def reference_errors(mask: masks.Mask, problem: Problem, true: oracle.Truth, score=PLAIN):
    """The errors of the dense reference, in the natural order of the tokens and then in random ones.

    The order in which a sum is added up decides its rounding: the error of one problem is a draw, which a layout or a
    ring makes again. Over orders of the same keys it was seen to vary by a factor of 2.4.
    """
    rng = np.random.default_rng(0)
    (_, length), (_, keys) = problem.q_tokens.shape, problem.k_tokens.shape
    for number in range(ORDERS):
        orders = [rng.permutation(n) if number else np.arange(n) for n in (length, keys)]

        def ordered(named: NamedTuple, *of_queries, orders=orders):
            sides = {name: orders[name not in of_queries] for name in named._fields if name != "d_score"}
            taken = {n: jax.tree.map(lambda x, o=o: np.asarray(x)[:, o], getattr(named, n)) for n, o in sides.items()}
            return named._replace(**taken)

        got = solve(REFERENCE, mask, ordered(problem, "q", "q_tokens", "d_out", "d_lse"), score=score)
        yield errors(got, ordered(true, "out", "lse", "dq"))


def check_errors(got, true, sizes, problem: Problem, references) -> None:
    """Of `references` only as many are computed as it takes."""
    floor = FLOOR[problem.q.dtype.name]
    rounded_lse = UNIT / 2 * np.abs(true.lse, where=np.isfinite(true.lse), out=np.zeros(true.lse.shape)).max()
    found, sizes = errors(got, true), arrays(sizes)
    share = {name: floor if name in ("out", "lse") else floor + rounded_lse for name in found}
    greatest = dict.fromkeys(found, 0.0)
    for reference in references:
        greatest = {name: max(reference[name], greatest[name]) for name in found}
        bound = {name: 2 * greatest[name] + share[name] * sizes[name].max() for name in found}
        # Written so that a NaN fails.
        failed = [
            f"{name}: error {found[name]:.3g}, allowed {bound[name]:.3g} (reference: {greatest[name]:.3g})"
            for name in found
            if not found[name] <= bound[name]
        ]
        if not failed:
            return
    raise AssertionError("; ".join(failed))


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.dtype.itemsize}")


class AttentionSuite:
    """Joined by a subclass that is parametrised with `system`; it overrides what its systems do not do."""

    def problem(self, system: System, seed=0, **shape) -> Problem:
        """Ragged documents, padding, duplicated and shuffled positions; one row has a shard of nothing but padding."""
        rng = np.random.default_rng(seed)
        tokens = formulas.random_tokens(rng, batch=4, length=LENGTH)
        document = tokens.document.copy()
        document[0, self.place(system) < LENGTH // max(system.shards, 2)] = PADDING
        return random_problem(rng, tokens.replace(document=document), **shape)

    def place(self, system: System) -> np.ndarray:
        """Where every token, in natural order, stands in the order of the layout."""
        return system.restore(np.arange(LENGTH)[None])[0]

    @pytest.mark.parametrize(("dtype", "heads", "kv_heads"), [("float32", 4, 2), ("bfloat16", 8, 1)])
    def test_results_and_gradients_obey_the_bound(self, system, dtype, heads, kv_heads):
        check_bound(system, RULE, self.problem(system, dtype=dtype, heads=heads, kv_heads=kv_heads))

    def test_what_is_hidden_is_exactly_zero(self, system):
        problem = self.problem(system)
        shown = visible(RULE, problem)
        blind, unseen = ~shown.any(2), ~shown.any(1)
        assert blind[0].any() and unseen[0].any()
        # A loss of lse has no finite gradient where lse is not.
        got = solve(system, RULE, problem._replace(d_lse=np.where(blind[..., None], -np.inf, problem.d_lse)))
        assert (got.out[blind] == 0).all() and np.isneginf(got.lse[blind]).all() and (got.dq[blind] == 0).all()
        assert (got.dk[unseen] == 0).all() and (got.dv[unseen] == 0).all()
        assert np.isfinite(got.lse[~blind]).all() and all(np.isfinite(x).all() for x in (*got[:1], *got[2:]))

    @pytest.mark.parametrize("row", [0, 77, LENGTH - 1])
    def test_the_gradient_of_a_row_reaches_the_pairs_it_sees_and_no_other(self, system, row):
        problem = self.problem(system)
        only = np.arange(LENGTH)[None, :, None, None] == row
        problem = problem._replace(d_out=problem.d_out * only, d_lse=problem.d_lse * only[..., 0])
        shown, got = visible(RULE, problem)[:, row], solve(system, RULE, problem)
        assert (got.dk[~shown] == 0).all()
        np.testing.assert_array_equal((got.dv != 0).any((2, 3)), shown)
        assert (got.dq[:, np.arange(LENGTH) != row] == 0).all()

    def test_a_document_changes_no_bit_of_another(self, system):
        problem = self.problem(system)
        numbers = [np.unique(row[row >= 0])[-1] for row in problem.q_tokens.document]
        edited = problem.q_tokens.document == np.array(numbers)[:, None]
        assert edited.any(1).all() and not edited.all(1).all()
        other = self.problem(system, seed=1)
        mixed = {name: getattr(problem, name).copy() for name in ("q", "k", "v", "d_out", "d_lse")}
        for name, x in mixed.items():
            x[edited] = getattr(other, name)[edited]
        before, after = solve(system, RULE, problem), solve(system, RULE, problem._replace(**mixed))
        for name, x in arrays(before).items():
            y = arrays(after)[name]
            np.testing.assert_array_equal(bits(x)[~edited], bits(y)[~edited], err_msg=name)
            assert (x[edited] != y[edited]).any(), name

    def test_reruns_are_equal_to_the_bit(self, system):
        problem = self.problem(system)
        first, second = (arrays(solve(system, RULE, problem)) for _ in range(2))
        for name in first:
            np.testing.assert_array_equal(bits(first[name]), bits(second[name]), err_msg=name)

    def test_a_hidden_block_is_not_computed(self, system):
        # Documents are runs of 26 in the order of the layout. NaN, which no arithmetic hides, in the first of them may
        # spread by the tiles that it shares with the next ones, and no further.
        place = self.place(system)
        problem = self.problem(system)
        tokens = problem.q_tokens.replace(document=np.tile(np.int32(place // 26), (4, 1)))
        problem = problem._replace(q_tokens=tokens, k_tokens=tokens)
        k, v = problem.k.copy(), problem.v.copy()
        k[:, place < TILE], v[:, place < TILE] = np.nan, np.nan
        before, after = solve(system, RULE, problem), solve(system, RULE, problem._replace(k=k, v=v))
        far = place >= LENGTH // 2
        for name, x in arrays(before).items():
            np.testing.assert_array_equal(bits(x)[:, far], bits(arrays(after)[name])[:, far], err_msg=name)
        assert np.isnan(after.out[:, place < TILE]).any()
