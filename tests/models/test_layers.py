"""Layers by themselves: the table of learned positions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from striate.lib.errors import UserError
from striate.models.layers import PositionEmbedding

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 9, 4)).astype(np.float32)
POSITION = RNG.integers(0, 6, size=(2, 9)).astype(np.int32)
EMBEDDING = PositionEmbedding(slots=6, dtype="float32")
PARAMETERS = nn.unbox(EMBEDDING.init(jax.random.key(0), X, POSITION))
TABLE = np.asarray(PARAMETERS["params"]["table"])


def test_every_token_gets_the_row_of_its_position():
    np.testing.assert_array_equal(EMBEDDING.apply(PARAMETERS, X, POSITION), X + TABLE[POSITION])
    order = RNG.permutation(9)
    shuffled = EMBEDDING.apply(PARAMETERS, X[:, order], POSITION[:, order])
    np.testing.assert_array_equal(shuffled, (X + TABLE[POSITION])[:, order])


def test_gradients_reach_the_rows_that_were_read():
    cotangent = RNG.normal(size=X.shape).astype(np.float32)
    _, pull = jax.vjp(lambda p, x: EMBEDDING.apply(p, x, POSITION), PARAMETERS, X)
    parameters, x = pull(jnp.asarray(cotangent))
    expected = np.zeros_like(TABLE)
    np.add.at(expected, POSITION, cotangent)
    np.testing.assert_allclose(parameters["params"]["table"], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(x, cotangent)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(6, "positions 0 to 5 and got 0 to 6: give it 7 slots"), (-1, "got -1 to 5: give it 6 slots")],
)
def test_a_position_outside_of_the_table_is_answered_or_poisons_its_token(wrong, message):
    position = POSITION.copy()
    position[1, 3] = wrong
    position[0, :2] = 0, 5
    with pytest.raises(UserError, match=message):
        EMBEDDING.apply(PARAMETERS, X, position)
    compiled = np.asarray(jax.jit(EMBEDDING.apply)(PARAMETERS, X, position))
    np.testing.assert_array_equal(np.isnan(compiled).all(-1), position == wrong)
