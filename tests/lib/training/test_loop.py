"""A run from its command: killed anywhere it ends as if it had not been, and what it holds is never written over."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from striate.lib.errors import UserError
from striate.lib.training import loop, metrics, partition, runs
from striate.lib.training.checkpoint import Checkpoints
from striate.lib.training.metrics import HELD_OUT, TRAINING
from striate.lib.training.step import Program
from striate.models.decoder import Layer

NUMBERS = ("step", "loss", "bits_per_byte", "grad_norm", "learning_rate")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled programs, so that only the first of the processes below compiles."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def start(experiment, cache, tmp_path):
    """start(*options, **environment): the process of `striate train` on the tiny run."""
    config = tmp_path / "tiny.py"
    names = "from striate.configs.schema import *\nfrom striate.models.decoder import Layer\n"
    config.write_text(f"{names}experiment = {experiment!r}\n")
    environment = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    processes = []

    def popen(*options, **variables):
        command = [sys.executable, "-m", "striate", "train", str(config), *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=os.environ | environment | variables, cwd=tmp_path, **pipes))
        return processes[-1]

    yield popen
    for process in processes:
        process.kill()
        process.communicate()


def finish(process, code=0):
    """What the process prints until it ends."""
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def wait_for_step(process, directory, step):
    """Until so many steps are recorded, or the process has ended."""
    while len(metrics.read(directory / TRAINING)["step"]) < step and process.poll() is None:
        time.sleep(0.01)


def numbers(directory):
    """What was recorded, without times."""
    training, held_out = metrics.read(directory / TRAINING), metrics.read(directory / HELD_OUT)
    return [training[name].tolist() for name in NUMBERS] + [
        held_out[name].tolist() for name in ("step", "bits_per_byte")
    ]


def parameters(directory, experiment):
    """The parameters of the newest checkpoint, on the host."""
    program = Program(experiment, partition.make_mesh(experiment.mesh))
    with Checkpoints(directory / "checkpoints", writable=False) as checkpoints:
        step, state = checkpoints.restore(program.state)[::-1]
    assert step == experiment.run.steps
    return jax.device_get(state)


def kill_often(start, experiment, kills, seed):
    """Runs to the end once undisturbed and once with kills at random moments; both have to leave the same."""
    root, draw = Path(experiment.run.directory), random.Random(seed)
    finish(start("--run.name", "whole"))
    for _ in range(kills):
        process = start("--run.name", "killed")
        wait_for_step(process, root / "killed", draw.randrange(1, experiment.run.steps))
        time.sleep(draw.random() * 0.2)  # into a step, the write of a checkpoint, an evaluation, ...
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(start("--run.name", "killed"))
    assert numbers(root / "killed") == numbers(root / "whole")
    jax.tree.map(np.testing.assert_array_equal, *(parameters(root / name, experiment) for name in ("killed", "whole")))


@pytest.mark.long
def test_a_killed_run_ends_bit_by_bit_like_one_that_was_not(start, experiment):
    kill_often(start, experiment, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_that_is_killed_again_and_again(start, experiment, seed):
    kill_often(start, experiment, kills=5, seed=seed)


@pytest.mark.slow
def test_two_processes_of_four_devices_train_like_one_of_eight(start, experiment):
    root = Path(experiment.run.directory)
    finish(start("--run.name", "one"))
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    job |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    pair = [start("--run.name", "two", JAX_PROCESS_ID=str(index), **job) for index in range(2)]
    outputs = [finish(process) for process in pair]
    assert "is finished" in outputs[0] and "is finished" not in outputs[1]
    for one, two in zip(numbers(root / "one"), numbers(root / "two"), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4)


@pytest.mark.long
def test_a_stopped_run_is_saved_and_a_finished_one_left_alone(start, experiment):
    directory = runs.directory(experiment.run)
    process = start("--run.checkpoint-every", "1000")
    wait_for_step(process, directory, 2)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert "Stopped after step" in output and "the same command goes on" in output
    stopped_at = int(next((directory / "checkpoints").iterdir()).name)
    assert len(metrics.read(directory / TRAINING)["step"]) == stopped_at < experiment.run.steps

    output = finish(start("--run.checkpoint-every", "1000"))
    assert "held out" in output and "xz -9" in output
    assert len(output.splitlines()) > 20 and max(map(len, output.splitlines())) < 200
    before = {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
    result = json.loads((directory / "result.json").read_text())
    assert result["steps"] == 12 and 0 < result["held_out_bits_per_byte"] < 8.1
    assert {"loss.png", "loss_by_position.png"} <= {path.name for path in before}

    output = finish(start())
    assert "is finished" in output
    assert before == {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}

    output = finish(start("--model.width", "64", "--run.steps", "13"), code=2)
    assert "model.width 32 -> 64" in output and "run.steps 12 -> 13" in output and "--run.name" in output
    assert before == {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture
def trained(experiment, change):
    """Two steps of the tiny run, in this process."""
    experiment = change(change(experiment, "run.steps", 2), "optimiser.warmup", 0)
    experiment = change(experiment, "run.sample_length", 8)
    return experiment, loop.train(experiment)


@pytest.mark.long
def test_a_run_is_evaluated_and_continued_from_its_directory_on_any_mesh(trained, capsys):
    experiment, result = trained
    directory = runs.directory(experiment.run)
    assert len(result.sample) <= 8
    evaluation = loop.evaluate(directory)
    assert evaluation.bits_per_byte == pytest.approx(result.held_out_bits_per_byte, rel=1e-6)
    assert f"{result.held_out_bits_per_byte:.3f} bits per byte" in capsys.readouterr().out
    assert loop.generate(directory, experiment.run.sample_prompt, 8) == result.sample
    again = runs.read_experiment(directory, loop.ROOMS)
    assert all(getattr(again, room) == getattr(experiment, room) for room in loop.ROOMS)

    other = partition.MeshConfig(fsdp=2, sequence=2, layout="zigzag")
    with runs.claimed(directory, dataclasses.replace(experiment, mesh=other)):
        pass  # writes the config
    assert loop.evaluate(directory).bits_per_byte == pytest.approx(result.held_out_bits_per_byte, rel=1e-5)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("run.steps", 0, ("run.steps", "0", "at least 1")),
        ("run.eval_every", 0, ("run.eval_every",)),
        ("run.name", "a/b", ("'a/b'", "--run.name")),
        ("data.length", 200, ("multiple of 128", "200")),
        ("mesh.tensor", 4, ("2 key/value heads", "tensor 4")),
        ("optimiser.warmup", 12, ("warm-up of 12", "12")),
        ("optimiser.accumulate", 5, ("12 steps", "5", "--run.steps")),
        ("data.ngram_orders", (2, 3), ("ngram_orders", "(2, 3)")),
        ("model.vocabulary", 256, ("256", "264")),
        ("model.pattern", (Layer(mask="causal() & same('segment')"),), ("segment", "position and document")),
        ("model.pattern", (Layer(), Layer(mixer="vssd")), ("'vssd' sees later tokens", "the next token")),
        ("mesh.sequence", 16, ("16 devices", "there are 8")),
        ("data.name", "no_such_set", ("no_such_set",)),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(experiment, change, path, value, words, monkeypatch):
    monkeypatch.setattr(Program, "__init__", lambda *args: pytest.fail("compiling has begun"))
    with pytest.raises(UserError) as error:
        loop.train(change(experiment, path, value))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not Path(experiment.run.directory).exists()


def test_two_processes_do_not_train_in_one_directory(experiment):
    directory = runs.directory(experiment.run)
    with (
        runs.claimed(directory, experiment),
        pytest.raises(UserError, match=r"Another process .* --run\.name"),
        runs.claimed(directory, experiment),
    ):
        pass
    with runs.claimed(directory, experiment):
        pass


def test_where_the_work_lies_may_change_and_what_is_computed_may_not(experiment, change):
    directory = runs.directory(experiment.run)
    with runs.claimed(directory, experiment):
        (directory / "checkpoints" / "2").mkdir(parents=True)
    for path, value in (("mesh.layout", "zigzag"), ("run.log_every", 1), ("model.remat", "layer"), ("run.keep", 5)):
        runs.compare(directory, change(experiment, path, value))
    for path, value in (("run.seed", 1), ("data.seed", 1), ("optimiser.clip", 2.0), ("model.width", 64)):
        with pytest.raises(UserError, match=f"{path} .* -> {value}"):
            runs.compare(directory, change(experiment, path, value))
    (directory / "checkpoints" / "2").rmdir()
    runs.compare(directory, change(experiment, "run.seed", 1))  # nothing has been trained
