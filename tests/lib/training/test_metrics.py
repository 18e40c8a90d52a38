"""Records: each step once, whatever was killed in between."""

import json
import math

import jax.numpy as jnp
import pytest

from striate.lib.errors import UserError
from striate.lib.training import metrics
from striate.lib.training.metrics import HELD_OUT, TRAINING, Metrics


def of_step(step):
    return {"loss": jnp.float32(step + 0.5), "bits_per_byte": jnp.float32(step), "tokens": jnp.float32(100)}


def run(directory, start, stop, *, evaluations=()):
    with Metrics(directory, start, every=2) as log:
        for step in range(start, stop):
            log.push(step, of_step(step))
        log.drain()
        for step in evaluations:
            log.evaluated(step, 2.0 + step)


def test_a_step_is_recorded_when_the_next_one_runs(tmp_path):
    with Metrics(tmp_path, 0, every=1) as log:
        assert log.push(0, of_step(0)) is None
        assert log.push(1, of_step(1))["step"] == 0
        assert metrics.read(tmp_path / TRAINING)["step"].tolist() == [0]
        assert log.drain()["loss"] == 1.5
        assert log.drain() is None
    assert metrics.read(tmp_path / TRAINING)["loss"].tolist() == [0.5, 1.5]


def test_steps_after_the_checkpoint_are_recorded_once(tmp_path):
    run(tmp_path, 0, 5, evaluations=(0, 2, 4))
    with open(tmp_path / TRAINING, "a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    run(tmp_path, 2, 4, evaluations=(4,))
    assert metrics.read(tmp_path / TRAINING)["step"].tolist() == [0, 1, 2, 3]
    assert metrics.read(tmp_path / HELD_OUT)["step"].tolist() == [0, 2, 4]


def test_a_run_that_starts_over_drops_every_record(tmp_path):
    run(tmp_path, 0, 3, evaluations=(0,))
    run(tmp_path, 0, 1)
    assert metrics.read(tmp_path / TRAINING)["step"].tolist() == [0]
    assert len(metrics.read(tmp_path / HELD_OUT)["step"]) == 0


def test_a_record_has_the_speed_and_reads_back(tmp_path):
    run(tmp_path, 0, 2)
    record = json.loads((tmp_path / TRAINING).read_text().splitlines()[1])
    assert record.keys() == {"step", "loss", "bits_per_byte", "tokens_per_second", "time"}
    assert record["tokens_per_second"] > 0
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, loss):
    with Metrics(tmp_path, 0, every=1) as log, pytest.raises(UserError, match=r"step 7 is (nan|inf).*learning-rate"):
        log.push(7, {**of_step(7), "loss": jnp.float32(loss)})
        log.drain()
    assert len(metrics.read(tmp_path / TRAINING)["step"]) == 0
