"""The TPU kernels of the linear recurrence, step by step on this machine."""

import jax.numpy as jnp
import numpy as np
import pytest

from oracles.linear import recurrence
from striate.pallas_kernels.tpu import linear
from suites.attention import FLOOR
from suites.linear import (
    USUAL,
    alike,
    attend,
    check_decays,
    check_gradients,
    check_isolation,
    check_that_a_state_goes_on,
    check_values,
    first_state,
    kinds,
    problem,
)

KERNEL = {"implementation": "pallas_tpu_interpret", "chunk": 32}


@pytest.fixture(autouse=True)
def two_chunks_a_block(monkeypatch):
    """Of float32, with 2 query heads to a key/value head: so that a short sequence has several blocks."""
    monkeypatch.setattr(linear, "BLOCK", 2 * 32 * 2 * 128 * 4)


@pytest.mark.parametrize("kind", kinds())
def test_the_kernel_is_the_recurrence(kind):
    check_values(problem(*kind), **KERNEL)


@pytest.mark.parametrize("kind", kinds(long=USUAL[2:]))
def test_gradients(kind):
    given = problem(*kind)
    check_gradients(given, before=first_state(given), **KERNEL)


@pytest.mark.parametrize("kind", kinds(long=USUAL[2:]))
def test_a_document_changes_no_bit_of_another(kind):
    check_isolation(kind, length=100, **KERNEL)


@pytest.mark.parametrize("kind", kinds(long=USUAL[:1] + USUAL[2:]))
def test_a_state_goes_on_where_it_was_left(kind):
    check_that_a_state_goes_on(problem(*kind), (0, 20, 21, 75), **KERNEL)


def test_keys_may_resemble_each_other():
    check_values(alike(problem("delta", False, "token", length=100, strength=1e-3), 0.9), **KERNEL)


@pytest.mark.long
@pytest.mark.parametrize("strength", [1e-6, 1e4])
@pytest.mark.parametrize("kind", [("sum", True, "channel"), ("delta", False, "token")], ids=str)
def test_weak_and_strong_decays(kind, strength):
    check_decays(problem(*kind, strength=strength), **KERNEL)


@pytest.mark.parametrize("kind", [("sum", False, "token"), ("delta", False, "channel")], ids=str)
def test_the_state_alone(kind):
    given = problem(*kind)
    document = jnp.asarray(given.document)
    q, k, v, g, beta = (x if x is None else jnp.asarray(x) for x in given[2:7])
    real = (document != -1)[:, :, None, None]
    k, v = jnp.where(real, k, 0), jnp.where(real, v, 0)
    g = jnp.where(real if g.ndim == 4 else real[..., 0], g, 0)
    beta = beta if beta is None else jnp.where(real[..., 0], beta, 0)
    inputs = linear.Inputs(q.reshape(2, 75, 2, 2, 8), k, v, g, beta, document)
    state = linear.Interpreted(*given[:2], 32).leave(inputs, linear.State.empty(k, v))
    np.testing.assert_allclose(state.memory, recurrence(given)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [("sum", False, "none"), ("sum", False, "token"), ("delta", False, "token")], ids=str)
def test_bfloat16(kind):
    # One factor of every product is rounded once more; the state and all sums stay wide.
    given = problem(*kind, length=200, width=16)
    given = given._replace(**{name: np.asarray(jnp.bfloat16(getattr(given, name))) for name in "qkv"})
    out, state = attend(given, **{**KERNEL, "chunk": 64})
    assert out.dtype == jnp.bfloat16 and state.memory.dtype == jnp.float32
    magnitude, _ = recurrence(given._replace(rule="sum", **{name: abs(getattr(given, name)) for name in "qkv"}))
    error = abs(np.float64(out) - recurrence(given)[0])
    assert error.max() <= FLOOR["bfloat16"] * magnitude.max()


def test_what_it_does_not_take_is_said():
    given = problem("sum", False, "none")
    with pytest.raises(NotImplementedError, match=r"'pallas_tpu' is for TPUs, .* \('pallas_tpu_interpret' runs"):
        attend(given, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="takes chunks of 16, 32, 64, 128, 256, 512 tokens, and not 48"):
        attend(given, **{**KERNEL, "chunk": 48})
    with pytest.raises(NotImplementedError, match="takes bfloat16 and float32, and not float16"):
        attend(given._replace(**{name: getattr(given, name).astype(np.float16) for name in "qkv"}), **KERNEL)
