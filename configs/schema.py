"""The Experiment: one frozen tree of the rooms' own configs. A config file defines `experiment = Experiment(...)`.

A file of configs/papers/ stands for a published system and defines `system = System(...)`, with an experiment where it
is a model of the next token.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from striate.lib.training.data import DataConfig
from striate.lib.training.loop import RunConfig
from striate.lib.training.optimiser import OptimiserConfig
from striate.lib.training.partition import MeshConfig
from striate.models.decoder import DecoderConfig

RELATIONS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Experiment:
    """What is trained, on what, how, where and for how long."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class System:
    """A published system, as what it is here."""

    paper: str
    """Authors, year and title."""
    form: str
    """What it is here: the layer, or the call."""
    tests: str
    """The file of its tests, from the root of the repository."""
    asks: dict[str, tuple[str, float]] = field(default_factory=dict)
    """What its benchmark, benchmarks/papers/NAME.py, has to reach: {what is measured: (">=" or "<=", figure)}."""

    def meets(self, what: str, reached: float) -> bool:
        """Whether a figure is what was asked."""
        relation, figure = self.asks[what]
        return RELATIONS[relation](reached, figure)
