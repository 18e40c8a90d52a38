"""What a run prints: all that is decided before step 0, a line or a bar while it trains, and what it came to."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from striate.lib import masks
from striate.lib.training import runs
from striate.lib.training.step import Program


class Report:
    """Prints to stdout, in 80 columns; of the processes of a job only the first one does."""

    def __init__(self):
        self._console = Console(quiet=jax.process_index() != 0, highlight=False)
        self._width = min(self._console.width, 80)

    def say(self, line: str) -> None:
        """One line, or a longer one folded by the terminal."""
        self._console.print(line, soft_wrap=True, markup=False)

    def before(self, experiment, program: Program, source, layout) -> None:
        """The config, the text, the parameters and where they lie, the mesh and what its layout promises."""
        self._table("experiment", _config_rows(experiment))
        self._table("text", ([name, _grouped(value)] for name, value in source.summary.items()))
        header = ["parameter", "axes, and what cuts them", "numbers", "on a device"]
        self._table(None, _parameter_rows(program.state), header)
        mesh = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
        self._table("mesh", [[mesh, f"{program.mesh.size} x {program.mesh.devices.flat[0].device_kind}"]])
        self._table(f"{layout}, attention by {experiment.mesh.strategy}", _balance_rows(experiment, source, layout))

    def memory(self, program: Program) -> None:
        """Compiles the step, and prints what it needs on each device."""
        start = time.perf_counter()
        with self._console.status("compiling the step"):
            plan = program.train.memory_analysis()
        self.say(f"The step was compiled in {time.perf_counter() - start:.0f} s.\n")
        if plan is None:  # not every device tells
            return
        params, held = _device_bytes(program.state.params), _device_bytes(program.state)
        rows = [
            ["parameters", _bytes(params)],
            ["optimiser state", _bytes(held - params)],
            ["gradients, as large as the parameters, activations and workspace", _bytes(plan.temp_size_in_bytes)],
            ["all of a step", _bytes(plan.argument_size_in_bytes + plan.temp_size_in_bytes)],
        ]
        self._table("memory on each device", rows)

    @contextlib.contextmanager
    def progress(self, start: int, steps: int, every: int) -> Iterator[_Progress]:
        """A bar on a terminal; elsewhere a line every so many steps."""
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal, expand=True) as bar:
            yield _Progress(self, bar, bar.add_task("", total=steps, completed=start), steps, every)

    def evaluated(self, step: int, bits: float) -> None:
        self.say(f"step {step}: held out {bits:.3f} bits per byte")

    def held_out(self, bits: float, xz: float) -> None:
        self.say(f"held out: {bits:.3f} bits per byte; xz -9 on the same bytes: {xz:.3f}")

    def stopped(self, done: int, steps: int) -> None:
        self.say(f"Stopped after step {done} of {steps}, which is saved: the same command goes on from there.")

    def finished(self, directory: Path, result: runs.Result, prompt: str) -> None:
        """What a finished run came to."""
        if result.sample:
            self.say(f"\n{prompt}{result.sample}\n")
        self.held_out(result.held_out_bits_per_byte, result.xz_bits_per_byte)
        self.say(f"The run is finished, {result.steps} steps: everything is in {directory}")

    def _table(self, title: str | None, rows, header: list[str] | None = None) -> None:
        table = Table(title=title, title_justify="left", box=None, show_header=bool(header), title_style="bold")
        rows = [list(map(str, row)) for row in rows]
        for index in range(len(rows[0])):
            numeric = bool(header) and index > 1
            table.add_column(header[index] if header else "", overflow="fold", justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(cell.replace("[", "\\[") for cell in row))
        self._console.print(table, width=self._width)
        self._console.print()


class _Progress:
    """The bar of one run, or its lines."""

    def __init__(self, report: Report, bar: Progress, task, steps: int, every: int):
        self._report, self._bar, self._task, self._steps, self._every = report, bar, task, steps, every

    def show(self, record: dict | None) -> None:
        """Shows the metrics of a step; None shows nothing."""
        if record is None:
            return
        done = record["step"] + 1
        text = "loss {loss:.3f}  {bits_per_byte:.3f} bits/byte  {tokens_per_second:,.0f} tokens/s".format(**record)
        self._bar.update(self._task, completed=done, description=text)
        if self._bar.disable and (done % self._every == 0 or done == self._steps):
            self._report.say(f"step {done}/{self._steps}  {text}")


def _config_rows(experiment) -> Iterator[list[str]]:
    for room, fields in runs.as_json(experiment).items():
        yield [room, ", ".join(f"{name} {_readable(value)}" for name, value in fields.items())]


def _parameter_rows(state) -> Iterator[list[str]]:
    """One row per parameter; places of the pattern that are alike are shown once, below the first and the last."""
    places = {}
    for path, leaf in jax.tree.leaves_with_path(state.params):
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        cut = 2 if len(parts) > 3 else 0
        row = ["  " * bool(cut) + "/".join(parts[cut:]), _axes(leaf), f"{leaf.size:,}", _bytes(_device_bytes(leaf))]
        places.setdefault("/".join(parts[:cut]), []).append(row)
    for rows, alike in itertools.groupby(places, key=places.get):
        first, *others = alike
        if first:
            yield [f"{first} .. {others[-1].split('/')[-1]}" if others else first, "", "", ""]
        yield from rows
    for name, tree in (("all parameters", state.params), ("optimiser state", state.opt_state)):
        numbers = sum(leaf.size for leaf in jax.tree.leaves(tree))
        yield [name, "", f"{numbers:,}", _bytes(_device_bytes(tree))]


def _balance_rows(experiment, source, layout) -> Iterator[list[str]]:
    """Per mask of the model, how even its work is over the devices, on the first batch."""
    tokens = source.batch(0).tokens
    length = source.config.length
    tile = min(max(128, length // 512), length // layout.shards)  # no more than 512 x 512 tiles are counted
    for text in dict.fromkeys(layer.mask for layer in experiment.model.pattern):
        work = layout.work(masks.parse(text), tokens, (tile, tile))
        yield [text, f"critical path {work.critical_path} tiles of {tile}, ideal {work.ideal:.0f}: {work.balance:.0%}"]


def _axes(leaf) -> str:
    """The axes of an array, each with the mesh axes of more than one shard that cut it: "256/sequence x 64"."""
    mesh, spec = leaf.sharding.mesh, [*leaf.sharding.spec, *[None] * leaf.ndim]
    cuts = [
        [axis for axis in (cut if isinstance(cut, tuple) else (cut,)) if axis and mesh.shape[axis] > 1] for cut in spec
    ]
    return " x ".join("/".join([str(size), *cut]) for size, cut in zip(leaf.shape, cuts, strict=False)) or "-"


def _device_bytes(tree) -> int:
    """Bytes of a tree of arrays on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bytes(count: int) -> str:
    power = min(max(int(math.log2(max(count, 1)) // 10), 0), 4)
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _grouped(value) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _readable(value) -> str:
    """A value of a config or a summary, without the punctuation of JSON."""
    if isinstance(value, list):
        return f"({', '.join(map(_readable, value))})"
    if isinstance(value, dict):
        return " ".join(map(_readable, value.values()))
    return repr(value) if isinstance(value, str) else str(value)
