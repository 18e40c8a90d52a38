"""Tokens: a pytree of named fields, checked when it is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from striate import Tokens, UserError

POSITION = np.array([[0, 1, 2, 0], [3, 2, 1, 0]], np.int32)


def test_arange_is_one_document_per_row():
    tokens = Tokens.arange(2, 3)
    np.testing.assert_array_equal(tokens.position, [[0, 1, 2], [0, 1, 2]])
    np.testing.assert_array_equal(tokens.document, np.zeros((2, 3)))
    assert tokens.position.dtype == tokens.document.dtype == jnp.int32


def test_fields_are_read_by_name_and_replaced():
    tokens = Tokens(position=POSITION, frame=POSITION + 5)
    assert tokens.names == ("document", "frame", "position") and tokens.shape == (2, 4)
    np.testing.assert_array_equal(tokens["frame"], POSITION + 5)
    np.testing.assert_array_equal(tokens.document, 0 * POSITION)
    replaced = tokens.replace(frame=POSITION, kind=POSITION * 2)
    np.testing.assert_array_equal(replaced["frame"], POSITION)
    np.testing.assert_array_equal(replaced["kind"], POSITION * 2)
    np.testing.assert_array_equal(tokens["frame"], POSITION + 5)
    np.testing.assert_array_equal(tokens.map(lambda x: x[:, 1:])["frame"], POSITION[:, 1:] + 5)


def test_padding_counts_as_another_document_in_queries():
    tokens = Tokens(position=POSITION, document=np.array([[0, 7, -1, -1], [-1, -1, 1, 1]], np.int32))
    queries = tokens.as_queries()
    np.testing.assert_array_equal(queries.document, [[0, 7, -2, -2], [-2, -2, 1, 1]])
    np.testing.assert_array_equal(queries.as_queries().document, queries.document)
    np.testing.assert_array_equal(queries.position, POSITION)


@pytest.mark.smoke
def test_tokens_are_a_pytree():
    tokens = Tokens(position=POSITION, frame=POSITION + 5)
    leaves, tree = jax.tree.flatten(tokens)
    assert len(leaves) == 3 and jax.tree.unflatten(tree, leaves).names == tokens.names
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tokens)]
    assert paths == [".document", ".frame", ".position"]
    moved = jax.jit(lambda t: t.replace(frame=t["frame"] + t.position))(tokens)
    np.testing.assert_array_equal(moved["frame"], 2 * POSITION + 5)
    shapes = jax.eval_shape(lambda t: t.as_queries(), tokens)
    assert shapes.shape == (2, 4)


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        (
            {"position": POSITION[0]},
            r"field 'position' has shape \(4,\); every field needs the shape \(batch, length\): reshape",
        ),
        (
            {"position": POSITION, "document": POSITION[:1]},
            r"field 'document' has shape \(1, 4\); every field needs the shape \(batch, length\) of position, \(2, 4\)",
        ),
        ({"position": POSITION, "frame": POSITION[0]}, r"field 'frame' has shape \(4,\)"),
        ({"position": POSITION * 1.0}, "field 'position' has dtype float64; fields are int32: cast it first"),
        ({"position": POSITION, "prefix": POSITION > 1}, "field 'prefix' has dtype bool"),
        ({"position": POSITION.astype(np.uint8)}, "field 'position' has dtype uint8"),
    ],
)
def test_bad_fields_are_answered(fields, answer):
    with pytest.raises(UserError, match=answer):
        Tokens(**fields)
