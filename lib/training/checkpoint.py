"""Checkpoints that survive kill -9 and tell when the disk has changed a bit.

Orbax writes them: asynchronously, every process its own shards, each step visible only once it is whole. It restores
flipped bits without an error, so a digest of every array is written beside each step and compared on restore.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from striate.lib.errors import UserError


class Restored(NamedTuple):
    state: object
    """The tree that was asked for, on the shardings that were asked for."""
    step: int
    """Steps trained when it was saved."""


class Checkpoints:
    """The checkpoints of one run: the `keep` newest, and the best by held-out loss.

    Args:
      directory: holds one folder per step.
      keep: how many of the newest are kept.
      writable: False never saves, moves or deletes anything.
      say: prints one line.
    """

    def __init__(self, directory: Path, keep: int = 2, writable: bool = True, say=print):
        import orbax.checkpoint as ocp

        self._directory, self._writable, self._say = Path(directory).absolute(), writable, say
        self._args, self._keep, self._held_out = ocp.args, keep, {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, create=writable, cleanup_tmp_directories=writable
        )
        with _muted():
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=("state", "record"))
        for step in self._manager.all_steps():
            with contextlib.suppress(Exception):  # a damaged record has no say in which step is the best
                self._held_out[step] = float(self._record(step)["held_out"])

    def save(self, step: int, state, held_out: float | None = None) -> None:
        """Copies the state to the host and writes it in the background.

        Args:
          step: steps trained.
          state: a tree of arrays; it may be donated as soon as this returns.
          held_out: bits per byte of the held-out text at this step, where they were measured.
        """
        self._held_out[step] = math.inf if held_out is None else held_out
        record = {"digests": digests(state), "held_out": held_out}
        items = self._args.Composite(state=self._args.StandardSave(state), record=self._args.JsonSave(record))
        self._manager.save(step, args=items)

    def restore(self, like, best: bool = False) -> Restored | None:
        """The newest step that is whole, or the best; None where nothing has been saved.

        A step that cannot be read, or whose content is not what was saved, is named in one line, moved out of the way
        (to damaged/ beside the checkpoints), and the one before it is taken.

        Args:
          like: the tree of ShapeDtypeStructs with shardings, on any mesh.
          best: prefer the least held-out loss to the newest.

        Raises:
          UserError: steps are there and none of them is whole.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if best:
            steps.sort(key=self._loss)
        for step in steps:
            state, fault = self._read(step, like)
            if fault is None:
                return Restored(state, step)
            self._set_aside(step, fault)
        if steps:
            raise UserError(
                f"None of the {len(steps)} checkpoints in {self._directory} is whole: "
                "restore the folder from a copy, or start anew under another --run.name."
            )
        return None

    def latest(self) -> int | None:
        """The newest step, read or not."""
        return self._manager.latest_step()

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax asks which of its steps, oldest first, shall stay."""
        steps = [info.step for info in checkpoints]
        stay = {*steps[-self._keep :], min(reversed(steps), key=self._loss)}
        return [step in stay for step in steps]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _loss(self, step: int) -> float:
        return self._held_out.get(step, math.inf)

    def _record(self, step: int) -> dict:
        return self._manager.restore(step, args=self._args.Composite(record=self._args.JsonRestore()))["record"]

    def _read(self, step: int, like) -> tuple[object, str | None]:
        """(state, None), or (None, what is wrong with it)."""
        with _muted():
            try:
                items = self._args.Composite(state=self._args.StandardRestore(like), record=self._args.JsonRestore())
                restored = self._manager.restore(step, args=items)
                saved, found = restored["record"]["digests"], digests(restored["state"])
                changed = [name for name in found if saved[name] != found[name]]
            except Exception as error:  # whatever a damaged file makes the readers of several formats raise
                time.sleep(0.2)  # their threads have not yet finished to complain
                return None, f"cannot be read ({type(error).__name__})"
        if changed:
            return (
                None,
                f"is not what was saved (the digests of {len(changed)} arrays differ, first {changed[0]})",
            )
        return restored["state"], None

    def _set_aside(self, step: int, fault: str) -> None:
        self._say(f"Checkpoint {step} {fault}: taking the one before it.")
        if not self._writable:
            return
        if jax.process_index() == 0:
            aside = self._directory.parent / "damaged" / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (self._directory / str(step)).rename(aside)
        self._manager.reload()


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Drops what is written to stderr meanwhile.

    A damaged file makes the threads and abandoned coroutines of orbax print hundreds of lines; one says it all.
    """
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        gc.collect()
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def digests(tree) -> dict[str, str]:
    """A 64-bit digest per array, by its path in the tree.

    Every element's bits are mixed with its index in the whole array, and the results are added modulo 2^32, in two
    lanes: the sum does not depend on the mesh or on the order of summation, and one changed element always changes it.
    """
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]
    lanes = jax.device_get(_digests(jax.tree.leaves(tree)))
    return {path: f"{int(a):08x}{int(b):08x}" for path, (a, b) in zip(paths, lanes, strict=True)}


@jax.jit
def _digests(arrays: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    return [_digest(array) for array in arrays]


def _digest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two uint32 sums over mix(bits ^ mix(index + lane)); the inner map is a bijection of the bits at every index."""
    width = 8 * x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(width, 32)}")).astype(jnp.uint32)
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return tuple(_mix(bits ^ _mix(index + jnp.uint32(lane))).sum(dtype=jnp.uint32) for lane in (1, 0x9E3779B9))


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every bit over all: the finaliser of MurmurHash3 (Appleby, public domain)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
