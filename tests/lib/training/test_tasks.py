"""Tasks: what a row asks for is what the oracle answers."""

import jax
import numpy as np
import pytest

from striate.lib.training.data import tasks

TASKS = [tasks.Recall(), tasks.Recall(gap=12), tasks.Overwrite(), tasks.NearestMarker(), tasks.Topic()]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_targets_are_those_of_the_oracle(task):
    rows = jax.vmap(task.sample)(jax.random.split(jax.random.key(0), 20))
    assert rows.inputs.shape == (20, task.length) and int(rows.inputs.max()) < task.vocabulary
    for inputs, targets, weights in zip(*map(np.asarray, rows), strict=True):
        np.testing.assert_array_equal(targets[weights == 1], task.oracle(inputs))
    assert len({row.tobytes() for row in np.asarray(rows.inputs)}) == 20
