"""What a run writes while it trains: JSON lines, each step once whatever happens, and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import jax
import numpy as np

from striate.lib.errors import UserError

TRAINING, HELD_OUT = "metrics.jsonl", "held_out.jsonl"


class Metrics:
    """The records of one run; only process 0 writes them.

    metrics.jsonl has one line for every step, held_out.jsonl one for every evaluation.

    Args:
      directory: the run's.
      start: steps trained so far; records of later ones, left by a run that was killed, are dropped.
      every: steps between two points of TensorBoard.
    """

    def __init__(self, directory: Path, start: int, every: int):
        self._every, self._waiting, self._since = every, None, time.perf_counter()
        self._directory, self._writes = directory, jax.process_index() == 0
        if not self._writes:
            return
        from tensorboardX import SummaryWriter

        roll_back(directory / TRAINING, lambda step: step < start)
        roll_back(directory / HELD_OUT, lambda step: step <= start and start > 0)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start, flush_secs=10)

    def push(self, step: int, metrics: dict[str, jax.Array]) -> dict | None:
        """Takes the metrics of a step that was just started, and records those of the step before it.

        So the device is never waited for while it has nothing to do.

        Returns:
          What was recorded, if anything.

        Raises:
          UserError: the loss is no number any more.
        """
        record = self.drain()
        self._waiting = step, metrics
        return record

    def drain(self) -> dict | None:
        """Records the step that is still waited for."""
        if self._waiting is None:
            return None
        (step, metrics), self._waiting = self._waiting, None
        record = {"step": step, **{name: float(value) for name, value in jax.device_get(metrics).items()}}
        if not math.isfinite(record["loss"]):
            raise UserError(
                f"The loss at step {step} is {record['loss']}; the checkpoints from before it are whole: "
                "start a run of another --run.name with a lower --optimiser.learning-rate."
            )
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        record |= {"tokens_per_second": record.pop("tokens") / seconds, "time": time.time()}
        if self._writes:
            self._write(TRAINING, record, plot=step % self._every == 0)
        return record

    def evaluated(self, step: int, bits_per_byte: float) -> None:
        """Records an evaluation after `step` steps."""
        record = {"step": step, "bits_per_byte": bits_per_byte, "time": time.time()}
        if self._writes:
            self._write(HELD_OUT, record, plot=True)

    def restart_clock(self) -> None:
        """What was done since the last record was no training."""
        self._since = time.perf_counter()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception) -> None:
        if self._writes:
            self._board.close()

    def _write(self, file: str, record: dict, plot: bool) -> None:
        with open(self._directory / file, "a") as lines:  # closed, the line is the system's and survives a kill
            lines.write(json.dumps(record) + "\n")
        for name in record.keys() - {"step", "time"} if plot else ():
            self._board.add_scalar(f"{Path(file).stem}/{name}", record[name], record["step"])


def roll_back(path: Path, keep) -> None:
    """Keeps the lines whose step `keep(step)` accepts; a last line that was cut off by a kill goes too."""
    if path.exists():
        lines = [json.dumps(record) + "\n" for record in _records(path) if keep(record["step"])]
        replace(path, "".join(lines))


def read(path: Path) -> dict[str, np.ndarray]:
    """A file of records as columns by name: "step" (int64), the rest float64. Empty where there is no such file."""
    records = _records(path) if path.exists() else []
    columns = {name: np.array([record[name] for record in records]) for name in (records[0] if records else ())}
    return columns or {name: np.array([]) for name in ("step", "bits_per_byte")}


def replace(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves either the old one or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def _records(path: Path) -> list[dict]:
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
