"""What linear memories answer to the keys they have stored, as closed forms say."""

import functools

import numpy as np

from striate import linear_attention
from striate.lib.analysis.associations import cosines, retrieved

WIDTH = 8


def pairs(count: int, unit: bool = False):
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, count, WIDTH)), rng.normal(size=(2, count, 5))
    return (np.linalg.qr(k.swapaxes(1, 2))[0].swapaxes(1, 2) if unit else k).astype(np.float32), v.astype(np.float32)


def test_a_stored_key_brings_back_its_value_and_what_others_resemble_it():
    k, v = pairs(19)
    want = np.zeros(v.shape)
    for b, i in np.ndindex(2, 19):
        others = sum((np.float64(k[b, j]) @ k[b, i]) * v[b, j] for j in range(19) if j != i)
        want[b, i] = (k[b, i] ** 2).sum() * np.float64(v[b, i]) + others
    np.testing.assert_allclose(retrieved(linear_attention, k, v), want, rtol=1e-5, atol=1e-5 * abs(want).max())


def test_orthonormal_keys_bring_back_their_values_as_long_as_there_are_dimensions():
    for count in (1, 5, WIDTH):
        k, v = pairs(count, unit=True)
        np.testing.assert_allclose(retrieved(linear_attention, k, v), v, rtol=1e-5, atol=1e-5)


def test_the_delta_rule_brings_back_the_last_value_exactly_and_plain_sums_do_not():
    k, v = pairs(19)
    k /= np.linalg.norm(k, axis=2, keepdims=True)
    last = retrieved(functools.partial(linear_attention, rule="delta"), k, v)[:, -1]
    np.testing.assert_allclose(last, v[:, -1], rtol=1e-5, atol=1e-5)
    assert abs(retrieved(linear_attention, k, v)[:, -1] - v[:, -1]).max() > 0.1


def test_cosines_are_those_of_the_angles():
    x, y = np.float32([[3, 0], [1, 1], [2, 0]]), np.float32([[5, 0], [1, 0], [-1, 0]])
    np.testing.assert_allclose(cosines(x, y), [1, 0.5**0.5, -1], rtol=1e-6)
