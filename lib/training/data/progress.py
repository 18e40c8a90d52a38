"""One line of progress on standard error for the long parts of preparing data; it goes away at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import track as rich_track


def track(items: Sequence, description: str) -> Iterator:
    """Iterates over `items` under a bar; no terminal, no bar."""
    console = Console(stderr=True)
    return rich_track(items, description=description, console=console, transient=True, disable=not _seen(console))


def waiting(description: str) -> Progress:
    """A context with the time elapsed, for work whose end cannot be told."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    progress = Progress(*columns, console=console, transient=True, disable=not _seen(console))
    progress.add_task(description, total=None)
    return progress


def _seen(console: Console) -> bool:
    return console.is_terminal or console.is_jupyter
