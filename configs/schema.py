"""The Experiment: one frozen tree of the rooms' own configs. A config file defines `experiment = Experiment(...)`."""

from __future__ import annotations

from dataclasses import dataclass, field

from striate.lib.training.data import DataConfig
from striate.lib.training.loop import RunConfig
from striate.lib.training.optimiser import OptimiserConfig
from striate.lib.training.partition import MeshConfig
from striate.models.decoder import DecoderConfig


@dataclass(frozen=True)
class Experiment:
    """What is trained, on what, how, where and for how long."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: RunConfig = field(default_factory=RunConfig)
