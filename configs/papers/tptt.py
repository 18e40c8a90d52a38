"""Memory as a gate in the model of configs/stdlib.py: softmax attention and a delta product, half of each.

striate train configs/papers/tptt.py

A decoder that is trained already is converted by striate.models.conversion.
"""

from striate.configs.papers.base import trained
from striate.configs.schema import System
from striate.models.decoder import Layer

system = System(
    paper="Furfaro 2025, TPTT: Transforming pretrained transformers into Titans",
    form='Layer(mixer="tptt"); convert(config, params), with adapters of striate.models.lora',
    tests="tests/models/test_conversion.py",
    asks={
        "overwritten values that the delta rule gets right": (">=", 0.97),
        "the same of a sum without decay": ("<=", 0.8),
        "loss after conversion, over that of softmax": ("<=", 1.15),
    },
)
experiment = trained("tptt", Layer(mixer="tptt"))
