"""A run's directory: its config, who may write to it, and what it came to."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax

from striate.lib.errors import UserError
from striate.lib.training.metrics import replace

# What may change between two starts of one run: it moves work around and leaves every number where it is.
FREE_ROOMS = ("mesh", "run")
FREE = ("data.data_dir", "model.implementation", "model.remat", "model.loss_chunk")
BOUND = ("run.seed", "run.steps")

CHECKPOINTS, CONFIG, RESULT = "checkpoints", "config.json", "result.json"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to."""

    steps: int
    """Steps trained; fewer than asked for where the run was stopped."""
    held_out_bits_per_byte: float | None = None
    """Over all of the held-out text; None where the run was stopped."""
    xz_bits_per_byte: float | None = None
    """What xz -9 makes of the same bytes."""
    sample: str = ""
    """What the model writes after the prompt."""


def directory(run) -> Path:
    """Where a run writes, from its config."""
    return Path(run.directory).expanduser() / run.name


def compare(path: Path, experiment) -> None:
    """Raises UserError where the directory holds checkpoints of an experiment that computes something else."""
    if not any(path.joinpath(CHECKPOINTS).glob("[0-9]*")):
        return
    # Through the dataclasses, so that a field that is newer than the run has its default.
    old, new = (_fields(as_json(tree)) for tree in (_build(type(experiment), read_config(path)), experiment))
    differ = [
        f"{name} {old.get(name, 'unset')} -> {new.get(name, 'unset')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and _bound(name)
    ]
    if differ:
        raise UserError(
            f"{path} holds a run of another config ({'; '.join(differ)}): "
            "give these fields their old values, or this run another --run.name."
        )


@contextlib.contextmanager
def claimed(path: Path, experiment) -> Iterator[None]:
    """The directory, with the config written, for this process (of a job, the first) alone; any end lets go of it.

    Raises:
      UserError: another process trains there.
    """
    if jax.process_index():
        yield
        return
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is training in {path}: wait for it, or give another --run.name."
            ) from None
        replace(path / CONFIG, json.dumps(as_json(experiment), indent=2) + "\n")
        yield


def as_json(experiment) -> dict:
    """The config tree as JSON reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def read_config(path: Path) -> dict:
    """The config of the run in a directory, as JSON.

    Raises:
      UserError: there is no run, or its config cannot be read.
    """
    try:
        return json.loads((path / CONFIG).read_text())
    except (OSError, json.JSONDecodeError):
        raise UserError(f"{path} holds no run ({CONFIG} is missing or damaged): give the directory of one.") from None


def read_experiment(path: Path, rooms: dict[str, type]) -> SimpleNamespace:
    """The experiment of the run in a directory.

    Args:
      rooms: the dataclass of each part, by name.
    """
    config = read_config(path)
    return SimpleNamespace(**{name: _build(kind, config[name]) for name, kind in rooms.items()})


def read_result(path: Path) -> Result | None:
    """The result of a finished run; None for one that is not finished."""
    try:
        return Result(**json.loads((path / RESULT).read_text()))
    except (OSError, json.JSONDecodeError):
        return None


def write_result(path: Path, result: Result) -> None:
    replace(path / RESULT, json.dumps(dataclasses.asdict(result), indent=2) + "\n")


def _build(kind, value):
    """A value of JSON as the type that a config field is annotated with."""
    if dataclasses.is_dataclass(kind):
        kinds = typing.get_type_hints(kind)
        return kind(**{name: _build(kinds[name], item) for name, item in value.items()})
    if typing.get_origin(kind) is tuple:
        return tuple(_build(typing.get_args(kind)[0], item) for item in value)
    return value


def _fields(config: dict) -> dict:
    return {f"{room}.{name}": value for room, fields in config.items() for name, value in fields.items()}


def _bound(name: str) -> bool:
    return name in BOUND or (name.split(".")[0] not in FREE_ROOMS and name not in FREE)
