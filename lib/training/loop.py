"""The training loop: starts or goes on by itself, is killed without loss, and ends with what the model has learnt."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from jax.experimental import multihost_utils

from striate.lib import masks
from striate.lib.analysis import plots
from striate.lib.decoding import sample
from striate.lib.errors import UserError
from striate.lib.text import VOCABULARY, decode, encode
from striate.lib.training import data, optimiser, partition, report, runs
from striate.lib.training.checkpoint import Checkpoints
from striate.lib.training.evaluation import Evaluation, held_out_loss, xz_bits_per_byte
from striate.lib.training.metrics import HELD_OUT, TRAINING, Metrics, read
from striate.lib.training.runs import Result
from striate.lib.training.step import Program, TrainState
from striate.models.decoder import DecoderConfig


@dataclass(frozen=True)
class RunConfig:
    """How long to train, what to write, and where."""

    name: str = "run"
    """The run's folder; the same name goes on with the same run."""
    directory: str = "runs"
    """Where the folders of runs lie; for several hosts, on a disk that they share."""
    steps: int = 1000
    """Batches to train on."""
    seed: int = 0
    """Seed of the parameters."""
    log_every: int = 10
    """Steps between two points of TensorBoard, and between two lines where the output is no terminal."""
    eval_every: int = 100
    """Steps between two evaluations."""
    eval_batches: int = 8
    """Batches of held-out text in one of them; the last evaluation takes all."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    keep: int = 2
    """The newest checkpoints that are kept, beside the best."""
    sample_prompt: str = "def "
    """What the model continues at the end."""
    sample_length: int = 400
    """Most tokens of that; 0 for none."""


ROOMS = {
    "model": DecoderConfig,
    "data": data.DataConfig,
    "optimiser": optimiser.OptimiserConfig,
    "mesh": partition.MeshConfig,
    "run": RunConfig,
}


def train(experiment) -> Result:
    """Trains, or goes on where the run of this name was stopped; a finished run is left as it is.

    Args:
      experiment: a dataclass with .model .data .optimiser .mesh .run, the configs of ROOMS.

    Raises:
      UserError: a config that cannot work, before anything is compiled or written.
    """
    check(experiment)
    mesh = partition.make_mesh(experiment.mesh)
    directory = runs.directory(experiment.run)
    runs.compare(directory, experiment)
    result = runs.read_result(directory)
    if result:
        report.Report().finished(directory, result, experiment.run.sample_prompt)
        return result
    source = data.open_source(experiment.data)
    with runs.claimed(directory, experiment):
        return _Training(experiment, mesh, source, directory).run()


def evaluate(directory: str | Path, best: bool = False) -> Evaluation:
    """Measures the newest (or best) checkpoint of a run on all of its held-out text, and prints it beside xz -9."""
    experiment, program, params = restore(Path(directory), best)
    source = data.open_source(experiment.data)
    evaluation = held_out_loss(program, params, source, partition.layout(experiment.mesh))
    report.Report().held_out(evaluation.bits_per_byte, xz_bits_per_byte(source.held_out_bytes()))
    return evaluation


def generate(directory: str | Path, prompt: str, steps: int, best: bool = False, **settings) -> str:
    """Continues a prompt with the newest (or best) checkpoint of a run.

    Args:
      settings: temperature, top_p and seed of decoding.sample.generate, which also says what it raises.
    """
    experiment, _, params = restore(Path(directory), best)
    return continued(experiment.model, params, prompt, steps, **settings)


def continued(model: DecoderConfig, params, prompt: str, steps: int, **settings) -> str:
    """What the model writes after a prompt, computed on one device; nothing in it can control a terminal."""
    ids = sample.generate(model, jax.device_get(params), encode(prompt), steps, **settings)
    text = decode(ids).decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def restore(directory: Path, best: bool = False) -> tuple[SimpleNamespace, Program, Any]:
    """The newest (or best) whole checkpoint of a run, on the run's mesh, or on one device where there are too few.

    Returns:
      (its experiment with the mesh used, the program, the parameters).

    Raises:
      UserError: no run, or a run without a checkpoint that is whole.
    """
    experiment = runs.read_experiment(directory, ROOMS)
    try:
        mesh = partition.make_mesh(experiment.mesh)
    except UserError:
        experiment.mesh = partition.MeshConfig(sequence=1, layout="contiguous", strategy="none")
        mesh = partition.make_mesh(experiment.mesh)
    program = Program(experiment, mesh)
    with Checkpoints(directory / runs.CHECKPOINTS, writable=False) as checkpoints:
        restored = checkpoints.restore(program.state, best)
    if restored is None:
        raise UserError(f"The run {directory} has no checkpoint yet: train it for longer.")
    return experiment, program, restored.state.params


def check(experiment) -> None:
    """Raises UserError for what cannot work, before anything is compiled or written."""
    model, text, mesh, run = experiment.model, experiment.data, experiment.mesh, experiment.run
    for name in ("steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep"):
        if getattr(run, name) < 1:
            raise UserError(f"run.{name} is {getattr(run, name)}; it has to be at least 1.")
    if not run.name or Path(run.name).name != run.name:
        raise UserError(f"run.name is {run.name!r}; it has to be the name of a folder: set --run.name.")
    partition.check(mesh, text.batch, text.length, model.heads, model.kv_heads)
    optimiser.check(experiment.optimiser, run.steps)
    if model.vocabulary < VOCABULARY:
        raise UserError(f"model.vocabulary is {model.vocabulary} and the text has {VOCABULARY} ids: set it to that.")
    for name in ("ngram_orders", "ngram_buckets"):
        ours, theirs = getattr(model, name), getattr(text, name)
        if ours != theirs and model.ngram_orders + text.ngram_orders:
            raise UserError(f"model.{name} is {ours} and data.{name} is {theirs}: set both to the same.")
    model.check_next_token()
    for layer in model.pattern:
        missing = masks.parse(layer.mask).fields - {"position", "document"}
        if missing:
            raise UserError(
                f"The mask {layer.mask} reads the field {min(missing)!r}, and the tokens of text have position and "
                "document: write it with these."
            )


class _Training:
    """One process's part of a run, from its first step or its last checkpoint to its end."""

    def __init__(self, experiment, mesh, source: data.Source, directory: Path):
        self.experiment, self.source, self.directory = experiment, source, directory
        self.layout = partition.layout(experiment.mesh)
        self.program = Program(experiment, mesh)
        self.report = report.Report()

    def run(self) -> Result:
        config = self.experiment.run
        self.report.before(self.experiment, self.program, self.source, self.layout)
        path = self.directory / runs.CHECKPOINTS
        with Checkpoints(path, config.keep, say=self.report.say) as self.checkpoints:
            restored = self.checkpoints.restore(self.program.state)
            state, start = restored or (self.program.initialise(), 0)
            self.report.memory(self.program)
            with Metrics(self.directory, start, config.log_every) as self.metrics, Stop() as stop:
                if start == 0:
                    self._evaluate(state, 0)
                state, done = self._steps(state, start, stop)
        if done < config.steps:
            self.report.stopped(done, config.steps)
            return Result(done)
        return self._finish(state)

    def _steps(self, state: TrainState, start: int, stop: Stop) -> tuple[TrainState, int]:
        """Trains from step `start` to the end, or until a signal; (the state, steps trained)."""
        config = self.experiment.run
        batches = self.source.batches(start, config.steps, self.layout)
        with contextlib.closing(batches), self.report.progress(start, config.steps, config.log_every) as progress:
            for done, batch in enumerate(batches, start + 1):
                state, metrics = self.program.train(state, partition.put(batch, self.program.mesh))
                progress.show(self.metrics.push(done - 1, metrics))
                held_out, stopped = None, stop.requested(done)
                if done % config.eval_every == 0 or done == config.steps:
                    progress.show(self.metrics.drain())
                    held_out = self._evaluate(state, done)
                if done % config.checkpoint_every == 0 or done == config.steps or stopped:
                    progress.show(self.metrics.drain())
                    self.checkpoints.save(done, state, held_out)
                    self.metrics.restart_clock()
                if stopped:
                    return state, done
        return state, config.steps

    def _evaluate(self, state: TrainState, step: int) -> float:
        """Held-out bits per byte of the first few batches, recorded."""
        batches = self.experiment.run.eval_batches
        bits = held_out_loss(self.program, state.params, self.source, self.layout, batches).bits_per_byte
        self.metrics.evaluated(step, bits)
        self.report.evaluated(step, bits)
        self.metrics.restart_clock()
        return bits

    def _finish(self, state: TrainState) -> Result:
        """The last evaluation, on all of the held-out text, with pictures and a sample."""
        config = self.experiment.run
        evaluation = held_out_loss(self.program, state.params, self.source, self.layout)
        xz, text = xz_bits_per_byte(self.source.held_out_bytes()), ""
        params = multihost_utils.process_allgather(state.params, tiled=True)
        if jax.process_index() == 0:
            if config.sample_length:
                text = continued(self.experiment.model, params, config.sample_prompt, config.sample_length)
            plots.loss_by_position(evaluation.bits_by_position, self.directory / "loss_by_position.png")
            training, held_out = (read(self.directory / name) for name in (TRAINING, HELD_OUT))
            curves = [(columns["step"], columns["bits_per_byte"]) for columns in (training, held_out)]
            plots.loss_curve(*curves, self.directory / "loss.png", {"xz -9": xz})
        result = Result(config.steps, evaluation.bits_per_byte, xz, text)
        if jax.process_index() == 0:
            runs.write_result(self.directory, result)
        self.report.finished(self.directory, result, config.sample_prompt)
        return result


class Stop:
    """The first SIGINT or SIGTERM asks to stop after the step under way, which is saved; a second one interrupts."""

    def __enter__(self) -> Stop:
        self._asked, self._before = False, {}
        with contextlib.suppress(ValueError):  # only the main thread may; elsewhere there is nothing to handle
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; all processes of a job get the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _handle(self, number, frame) -> None:
        self._asked = True
        self.__exit__()
