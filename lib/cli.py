"""The program `striate`: every command is a dataclass that tyro fills in from the command line, then calls.

What is heavy (models, training, data, matplotlib) is imported by the command that needs it, so that --help is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import runpy
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import reduce
from itertools import takewhile, zip_longest
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Generic, NoReturn, TypeVar

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional, arg, subcommand

from striate.lib.errors import UserError
from striate.lib.show import ShowLayout, ShowMask

ROOT = Path(__file__).resolve().parent.parent
E = TypeVar("E")  # Experiment, which is imported only for the commands that read one


@dataclass(frozen=True)
class Configured(Generic[E]):
    """A command that reads an experiment; every field of it is an option."""

    config: Annotated[Positional[str], arg(metavar="CONFIG")]
    """A Python file that defines `experiment`, or the name of one in configs/."""
    experiment: Annotated[E, arg(name="")]


@dataclass(frozen=True)
class Train(Configured[E]):
    """Train what CONFIG describes, or go on where the same command was stopped."""

    def __call__(self) -> None:
        from striate.lib.training import loop

        loop.train(self.experiment)


@dataclass(frozen=True)
class ShowConfig(Configured[E]):
    """Print what CONFIG describes, field by field, with the options given in their place."""

    json: Annotated[bool, FlagCreatePairsOff] = False
    """Print JSON instead of a table."""

    def __call__(self) -> None:
        if self.json:
            print(json.dumps(dataclasses.asdict(self.experiment), indent=2))
            return
        table = Table("option", "value", box=box.SIMPLE)
        for option, value in options(self.experiment).items():
            table.add_row(option, repr(value))
        Console(highlight=False).print(table)


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained model on all of the held-out text, in bits per byte."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """The directory that training wrote, or its name in runs/."""

    def __call__(self) -> None:
        from striate.lib.training import loop

        loop.evaluate(find_run(self.run))


@dataclass(frozen=True)
class Generate:
    """Continue a text with a trained model."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """The directory that training wrote, or its name in runs/."""
    prompt: str = "def "
    """The text to continue."""
    steps: int = 256
    """Tokens to add."""
    temperature: float = 0.8
    """1 samples from the model as it is, less is more careful, 0 takes the likeliest token every time."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that have this probability together."""
    seed: int = 0
    """The same seed gives the same text."""

    def __call__(self) -> None:
        from striate.lib.training import loop

        settings = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        print(self.prompt + loop.generate(find_run(self.run), self.prompt, self.steps, **settings))


@dataclass(frozen=True)
class Bench:
    """Run benchmarks/NAME.py of a checkout."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """The benchmark, without .py."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the figures to this file."""

    def __call__(self) -> None:
        folder = ROOT / "benchmarks"
        found = sorted([*folder.glob("[a-z]*.py"), *folder.glob("papers/[a-z]*.py")])
        files = {file.relative_to(folder).with_suffix("").as_posix().replace("_", "-"): file for file in found}
        if not files:
            raise UserError("There are no benchmarks beside the package: they come with a clone of the repository.")
        name = self.name.replace("_", "-")
        if name not in files:
            near = nearest(name, files)
            raise UserError(f"There is no benchmark {self.name!r}{near}: there are {', '.join(files)}.")
        figures = ["--json", str(self.json)] if self.json else []
        raise SystemExit(subprocess.run([sys.executable, str(files[name]), *figures], check=False).returncode)


@dataclass(frozen=True)
class Systems:
    """List the published systems: what each is here, and what its benchmark was to reach and did."""

    def __call__(self) -> None:
        measured = json.loads((ROOT / "configs/papers/results.json").read_text())
        table = Table("system", "is", "asked", "reached", box=box.SIMPLE)
        for name, given in papers().items():
            system, reached = given["system"], measured.get(name, {})
            config = f"\nstriate train papers/{name}" if "experiment" in given else ""
            asks = [f"{what} {relation} {figure:g}" for what, (relation, figure) in system.asks.items()]
            figures = [_figure(system, what, reached.get(what)) for what in system.asks]
            lines = zip_longest([f"{system.form}{config}"], asks, figures, fillvalue="")
            for index, (form, ask, figure) in enumerate(lines):
                table.add_row(name if index == 0 else "", form, ask, figure)
            table.add_row("", "", "", "")
        Console(highlight=False).print(table)


def _figure(system, what: str, reached: float | None) -> str:
    if reached is None:
        return "not measured"
    return f"{reached:g}" if system.meets(what, reached) else f"{reached:g}, missed"


COMMANDS = {
    "train": Train,
    "evaluate": Evaluate,
    "generate": Generate,
    "show mask": ShowMask,
    "show layout": ShowLayout,
    "show config": ShowConfig,
    "systems": Systems,
    "bench": Bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line, by default the process's own, and returns its exit code.

    2 means that something given cannot work: stderr says what, and nothing has been written over.
    """
    try:
        parse(sys.argv[1:] if argv is None else argv)()
    except UserError as error:
        print(f"striate: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:
        return end.code
    except KeyboardInterrupt:
        print("striate: stopped", file=sys.stderr)
        return 130
    return 0


def parse(argv: Sequence[str]) -> Any:
    """The command that a command line stands for, filled in: an instance of one of COMMANDS, to be called.

    Raises:
      UserError: a command, a config or an option that does not exist, with the nearest that does.
      SystemExit: 0 after --help; 2 after a value that tyro refused, which it has explained on stderr.
    """
    named = list(takewhile(lambda word: not word.startswith("-"), argv[:2]))
    name = next((name for name in map(" ".join, (named[:1], named)) if name in COMMANDS), "")
    if not name:
        _overview(named, argv[len(named) :] or ["--help"])
    words = argv[len(name.split()) :]
    kind = COMMANDS[name]
    start = _experiment(name, words) if issubclass(kind, Configured) else {"f": kind}
    command, unknown = _fill(**start, prog=f"striate {name}", args=words)
    if unknown:
        option = unknown[0].partition("=")[0]
        near = nearest(option, [known.replace("--experiment.", "--") for known in options(command)])
        raise UserError(f"striate {name} has no option {option!r}{near}: striate {name} --help lists them.")
    return command


def _fill(**settings: Any) -> tuple[Any, list[str]]:
    """tyro.cli: (the command, words that nothing understood). A UserError of a config passes through it as it was."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(**settings, return_unknown_args=True)
    except SystemExit as end:
        error = end.__context__
        while error and not isinstance(error, UserError):
            error = error.__context__
        if error:
            raise error from None
        sys.stderr.write(printed.getvalue())
        raise


def _overview(named: Sequence[str], rest: Sequence[str]) -> NoReturn:
    """Lists the commands, those of a group where its name alone was given; any other name has to be a mistake."""

    @dataclass
    class Listed:
        """A command by its name; its own --help lists its options."""

    group = [name for name in COMMANDS if name.split()[: len(named)] == list(named)]
    if not group:
        near = nearest(" ".join(named), COMMANDS) or nearest(named[0], COMMANDS)
        raise UserError(f"There is no command {' '.join(named)!r}{near}: there are {', '.join(COMMANDS)}.")
    listed = [Annotated[Listed, subcommand(name, description=COMMANDS[name].__doc__)] for name in group]
    description = "Attention on long sequences: any mask, any token order, any mesh."
    tyro.cli(reduce(or_, listed), prog="striate", description=description, args=rest)


def _experiment(name: str, words: Sequence[str]) -> dict[str, Any]:
    """For tyro: the command with the fields of an Experiment, starting from the values of the CONFIG in words[0]."""
    from striate.configs.schema import Experiment

    command = COMMANDS[name]
    if words and not words[0].startswith("-"):
        return {"f": command[Experiment], "default": command(words[0], load_experiment(words[0]))}
    if {"-h", "--help"}.isdisjoint(words):
        raise UserError(f"striate {name} reads its CONFIG first, then options: striate {name} CONFIG --model.layers 4.")
    return {"f": command[Experiment]}


def load_experiment(name: str) -> Any:
    """The `experiment` of a config: a Python file, or the name of one in configs/.

    Raises:
      UserError: no such file, or one that defines no Experiment.
    """
    from striate.configs.schema import Experiment

    files = [file for file in sorted(ROOT.glob("configs/**/[a-z]*.py")) if file.stem not in ("schema", "base")]
    shipped = {file.relative_to(ROOT / "configs").with_suffix("").as_posix(): file for file in files}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        near = nearest(path.stem, shipped)
        raise UserError(f"There is no config {name!r}{near}: give a Python file or one of {', '.join(shipped)}.")
    experiment = runpy.run_path(str(path)).get("experiment")
    if not isinstance(experiment, Experiment):
        raise UserError(f"The config {name!r} defines no experiment: end it with experiment = Experiment(...).")
    return experiment


def papers() -> dict[str, dict[str, Any]]:
    """What the file of each published system in configs/papers/ defines, by its name."""
    given = {file.stem: runpy.run_path(str(file)) for file in sorted(ROOT.glob("configs/papers/[a-z]*.py"))}
    return {name: defined for name, defined in given.items() if "system" in defined}


def find_run(name: str) -> Path:
    """The directory of a run: a path, or its name in runs/.

    Raises:
      UserError: no such directory, or one that training did not write.
    """
    runs = {file.parent.name: file.parent for file in sorted(Path("runs").glob("*/config.json"))}
    path = runs.get(name, Path(name))
    if not (path / "config.json").is_file():
        known = f"there are {', '.join(runs)}" if runs else "striate train makes one"
        raise UserError(f"There is no run {name!r}{nearest(path.name, runs)}: {known}.")
    return path


def options(config: Any, prefix: str = "--") -> dict[str, Any]:
    """The command-line options that set the fields of a dataclass, with their values: {"--data.length": 4096, ...}."""
    if dataclasses.is_dataclass(config):
        parts = {field.name.replace("_", "-"): getattr(config, field.name) for field in dataclasses.fields(config)}
    elif isinstance(config, tuple) and any(map(dataclasses.is_dataclass, config)):
        parts = {str(index): part for index, part in enumerate(config)}
    else:
        return {prefix.removesuffix("."): config}
    found: dict[str, Any] = {}
    for name, part in parts.items():
        found |= options(part, f"{prefix}{name}.")
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """A question after the known name that is nearest, in parentheses; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
