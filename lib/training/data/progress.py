"""One progress bar for the long parts of preparing data."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import track as rich_track


def track(items: Sequence, description: str):
    """Iterates over `items` under a bar on standard error, which goes away at the end; no terminal, no bar."""
    console = Console(stderr=True)
    seen = console.is_terminal or console.is_jupyter
    return rich_track(items, description=description, console=console, transient=True, disable=not seen)
