"""Adapters: low-rank updates of some parameters of a decoder, which are trained while the parameters stay as they are.

    W + alpha / rank A B        A (in, rank) normal, B (rank, out) 0 at the start

Source: Hu et al. 2022 (LoRA), section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from striate.lib.errors import UserError

PROJECTIONS = {"qkv": 1, "out": 2}
"""Parameters of a layer of attention, and how many of their axes, after that of the layers, are what goes in."""


class Adapter(NamedTuple):
    a: jax.Array  # (layers, in, rank)
    b: jax.Array  # (layers, rank, out)


def init(key: jax.Array, params, rank: int = 8, names: Mapping[str, int] = PROJECTIONS) -> dict[str, Adapter]:
    """An Adapter for every parameter that has one of these names, by its path; it changes nothing yet.

    A parameter has the axis of the stacked layers first; every layer has a matrix of its own. Of the axes that follow,
    `names` says how many are the rows of the matrix, taken together; the others are its columns. So queries, keys and
    values, which one product makes, have one A.

    Raises:
      UserError: no parameter has such a name.
    """
    found = {path: x for path, x in _flat(params).items() if _name(path) in names}
    if not found:
        raise UserError(f"No parameter is named {' or '.join(map(repr, names))}: nothing would be adapted.")
    adapters = {}
    for (path, x), own in zip(found.items(), jax.random.split(key, len(found)), strict=True):
        inputs = math.prod(x.shape[1 : 1 + names[_name(path)]])
        a = inputs**-0.5 * jax.random.normal(own, (len(x), inputs, rank))
        adapters[path] = Adapter(a, jnp.zeros((len(x), rank, x[0].size // inputs)))
    return adapters


def merge(params, adapters: dict[str, Adapter], alpha: float = 16.0):
    """The parameters with their updates added: what the model is run with, in training too."""
    flat = _flat(params)
    for path, (a, b) in adapters.items():
        update = alpha / a.shape[2] * (a @ b)
        flat[path] = flat[path] + update.reshape(flat[path].shape).astype(flat[path].dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def _flat(params) -> dict[str, jax.Array]:
    return traverse_util.flatten_dict(params, sep="/")


def _name(path: str) -> str:
    return path.rpartition("/")[2]
