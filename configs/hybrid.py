"""The model of configs/stdlib.py with a gated delta rule in place of windows: three recurrences to one full attention.

striate train configs/hybrid.py

Attention goes around the ring in striped order; the recurrences put the stripes into runs, by one all-to-all there and
one back. The feed-forward networks are narrower, so that parameters are as many as those of configs/stdlib.py.
"""

import dataclasses

from striate.configs.schema import Experiment
from striate.configs.stdlib import GLOBAL, experiment
from striate.models.decoder import Layer

DELTA = Layer(mixer="gated_delta")

experiment: Experiment = dataclasses.replace(
    experiment,
    model=dataclasses.replace(experiment.model, hidden=496, pattern=(DELTA, DELTA, DELTA, GLOBAL)),
    mesh=dataclasses.replace(experiment.mesh, stripe=64),
    run=dataclasses.replace(experiment.run, name="hybrid"),
)
