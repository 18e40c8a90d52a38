"""Attention spread over devices: the suite for every strategy, layout and number of shards, and what travels."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from striate.lib.layouts import Contiguous, Striped, ZigZag
from striate.lib.parallel import AllGather, Ring
from suites import attention as suite
from suites.attention import System


def mesh(**axes: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), devices=devices)


def layouts(shards: int) -> tuple:
    return Contiguous(shards), Striped(shards, 1), Striped(shards, 13), ZigZag(shards)


SYSTEMS = [
    System(parallel=strategy(mesh(sequence=shards)), layout=layout)
    for strategy, shards in itertools.product((Ring, AllGather), (1, 2, 4, 8))
    for layout in layouts(shards)
]


@pytest.mark.long
@pytest.mark.parametrize("system", SYSTEMS, ids=str)
class TestEveryStrategyAndLayout(suite.AttentionSuite):
    pass
