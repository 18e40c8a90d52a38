"""Flowformer's layers, causal, in the model of configs/stdlib.py: what flows in and out of a token is conserved.

striate train configs/papers/flow.py
"""

from striate.configs.papers.base import trained
from striate.configs.schema import System
from striate.models.decoder import Layer

system = System(
    paper="Wu et al. 2022, Flowformer: Linearizing transformers with conservation flows",
    form='Layer(mixer="flow"); to both sides global_flow(q, k, v)',
    tests="tests/lib/test_linear_variants.py",
    asks={
        "entropy without competition less with it, constructed": (">=", 0.1),
        "the same of trained layers": (">=", 0.1),
    },
)
experiment = trained("flow", Layer(mixer="flow"))
