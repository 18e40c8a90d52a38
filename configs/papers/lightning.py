"""TransNormer's layers in the model of configs/stdlib.py: silu features and a fixed decay for each head.

striate train configs/papers/lightning.py
"""

from striate.configs.papers.base import trained
from striate.configs.schema import System
from striate.models.decoder import Layer

system = System(
    paper="Qin et al. 2024, Lightning Attention-2",
    form='Layer(mixer="lightning")',
    tests="tests/lib/test_linear_variants.py",
    asks={
        "cost of a token at 8192 over 1024 tokens": ("<=", 2.5),
        "the same of the quadratic form": (">=", 8.0),
        "times faster than it at 4096": (">=", 8.0),
    },
)
experiment = trained("lightning", Layer(mixer="lightning"))
