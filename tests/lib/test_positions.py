"""RoPE: a rotation by the position that the Tokens give."""

import jax.numpy as jnp
import numpy as np
import pytest

from striate import UserError
from striate.lib.positions import rope

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 50, 3, 16)).astype(np.float32)
POSITION = RNG.integers(0, 1000, size=(2, 50)).astype(np.int32)


def rotated(x, position, theta):
    """The definition, on complex numbers in float64."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * np.float64(x[..., half:])
    pairs *= np.exp(1j * position[:, :, None, None] * np.float64(theta) ** (-np.arange(half) / half))
    return np.concatenate([pairs.real, pairs.imag], -1)


@pytest.mark.smoke
@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_pairs_are_turned_by_their_position(theta):
    # An angle of 1000 in float32 is known to 1000 eps.
    allowed = 1000 * np.finfo(np.float32).eps * np.abs(X).max()
    np.testing.assert_allclose(rope(X, POSITION, theta), rotated(X, POSITION, theta), rtol=0, atol=allowed)


def test_position_zero_changes_nothing_and_the_dtype_stays():
    np.testing.assert_array_equal(rope(X, 0 * POSITION), X)
    assert rope(jnp.asarray(X, jnp.bfloat16), POSITION).dtype == jnp.bfloat16


def test_products_depend_on_distance_alone():
    q, k = X[:, :1], X[:, 1:2]
    at = [
        np.einsum("bthd,bthd->h", rope(q, position), rope(k, position - 7))
        for position in (np.full((2, 1), 7, np.int32), np.full((2, 1), 300, np.int32))
    ]
    np.testing.assert_allclose(*at, rtol=1e-4, atol=1e-4)


def test_any_order_of_the_tokens_gives_the_same_rotation():
    order = np.random.default_rng(1).permutation(50)
    np.testing.assert_array_equal(rope(X[:, order], POSITION[:, order]), rope(X, POSITION)[:, order])


def test_an_odd_width_is_answered():
    with pytest.raises(UserError, match="head_dim is even; got 15"):
        rope(X[..., 1:], POSITION)
