"""Across: how the mixers of a model cross the devices of one mesh, each kind in its own way."""

from __future__ import annotations

from dataclasses import dataclass

from striate.lib.parallel.sharding import SequenceParallel
from striate.lib.parallel.state_scan import RecurrenceParallel


@dataclass(frozen=True)
class Across:
    """One order of the tokens, and what takes each kind of mixer over it.

    Attributes:
      attention: for softmax attention.
      recurrence: for linear recurrences and convolutions; None where a model has none.
    """

    attention: SequenceParallel
    recurrence: RecurrenceParallel | None = None
