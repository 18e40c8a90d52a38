"""Layers of higher-order linear attention in the model of configs/stdlib.py: second order and asymmetric in turn.

striate train configs/papers/hla.py
"""

from striate.configs.papers.base import trained
from striate.configs.schema import System
from striate.models.decoder import Layer

system = System(
    paper="Zhang et al. 2025, Higher-order linear attention",
    form='Layer(mixer="second_order"), Layer(mixer="asymmetric")',
    tests="tests/lib/test_linear_variants.py",
    asks={
        "two hops: error of the asymmetric product": ("<=", 0.0),
        "two hops: what first order answers": ("<=", 0.0),
        "float32 against float64, of the greatest output": ("<=", 1e-4),
    },
)
experiment = trained("hla", Layer(mixer="second_order"), Layer(mixer="asymmetric"))
