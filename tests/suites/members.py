"""Members of the family of linear attention, as functions of three arrays, each beside its truth in numpy."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oracles import linear_variants as oracle
from oracles.derivatives import gradients
from striate import Tokens
from suites.linear import documents


class Problem(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    document: np.ndarray

    @property
    def tokens(self) -> Tokens:
        return Tokens(position=self.document * 0, document=self.document)


class Member(NamedTuple):
    run: Callable
    """(q, k, v, tokens=..., **how) -> out."""
    truth: Callable
    """Of one document and head."""
    places: Callable = oracle.by_run
    """What a document is."""

    def true(self, given: Problem, *arrays) -> np.ndarray:
        return oracle.over_documents(self.truth, given.document, *(arrays or given[:3]), places=self.places)

    def __call__(self, given: Problem, **how):
        return jax.jit(lambda q, k, v: self.run(q, k, v, tokens=given.tokens, **how))(*given[:3])


def problem(seed=0, batch=2, length=37, heads=4, kv_heads=2, width=3, value_width=2, strength=1.0) -> Problem:
    rng = np.random.default_rng(seed)
    shapes = (heads, width), (kv_heads, width), (kv_heads, value_width)
    arrays = (strength * rng.normal(size=(batch, length, *shape)) for shape in shapes)
    return Problem(*(x.astype(np.float32) for x in arrays), documents(rng, batch, length))


def check_values(member: Member, given: Problem, **how) -> None:
    true = member.true(given)
    np.testing.assert_allclose(member(given, **how), true, rtol=1e-5, atol=1e-5 * abs(true).max())


def check_gradients(member: Member, given: Problem, **how) -> None:
    """In float32 against central differences of the truth."""
    true = functools.partial(member.true, given)
    d_out = np.random.default_rng(9).normal(size=true().shape)

    def loss(arrays):
        return (member.run(*arrays, tokens=given.tokens, **how) * d_out.astype(np.float32)).sum()

    for name, got, want in zip(
        "qkv", jax.jit(jax.grad(loss))(given[:3]), gradients(true, given[:3], d_out), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * abs(want).max(), err_msg=name)


def check_documents_do_not_mix(member: Member, given: Problem, edited, **how) -> None:
    """Other arrays in the edited documents change no bit of the others, nor of their gradients."""
    other = problem(seed=1, length=given.document.shape[1])
    assert edited.any() and not edited.all()

    @jax.jit
    def results(*arrays):
        out, pull = jax.vjp(lambda *arrays: member.run(*arrays, tokens=given.tokens, **how), *arrays)
        return out, *pull(jnp.ones_like(out))

    mixed = (np.where(edited[:, :, None, None], y, x) for x, y in zip(given[:3], other[:3], strict=True))
    for before, after in zip(results(*given[:3]), results(*mixed), strict=True):
        np.testing.assert_array_equal(np.asarray(before)[~edited], np.asarray(after)[~edited])
        assert (np.asarray(before)[edited] != np.asarray(after)[edited]).any()
        assert np.isfinite(after).all()


def check_memory_is_linear(member: Member, **how) -> None:
    """Of results and gradients, in the length."""

    def temporary_bytes(length: int) -> int:
        def both(q, k, v):
            out, pull = jax.vjp(lambda *arrays: member.run(*arrays, **how), q, k, v)
            return out, *pull(out)

        array = jax.ShapeDtypeStruct((1, length, 2, 4), np.float32)
        return jax.jit(both).lower(array, array, array).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1024) < 2.2 * temporary_bytes(512)
