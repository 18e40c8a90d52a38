"""What the experiments of published systems share: the model of configs/stdlib.py with other mixers."""

import dataclasses

from striate.configs.schema import Experiment
from striate.configs.stdlib import experiment as stdlib
from striate.models.decoder import Layer


def trained(name: str, *pattern: Layer, **model) -> Experiment:
    """configs/stdlib.py with this pattern of layers; `model` sets further fields of its DecoderConfig."""
    return dataclasses.replace(
        stdlib,
        model=dataclasses.replace(stdlib.model, pattern=pattern, **model),
        mesh=dataclasses.replace(stdlib.mesh, layout="zigzag"),
        run=dataclasses.replace(stdlib.run, name=name),
    )
