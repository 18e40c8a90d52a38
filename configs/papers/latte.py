"""Latte's layers in the model of configs/stdlib.py: queries pick among latents, each a running softmax over time.

striate train configs/papers/latte.py
"""

from striate.configs.papers.base import trained
from striate.configs.schema import System
from striate.models.decoder import Layer

system = System(
    paper="Dolga et al. 2024, Latte: Latent attention for linear time transformers",
    form='Layer(mixer="latte"); to both sides global_softmax(softmax(q), k, v)',
    tests="tests/lib/test_linear_variants.py",
    asks={
        "recall, less that of a plain recurrence": (">=", -0.05),
        "time of token 10000 over token 100": ("<=", 1.2),
        "the same of the bytes of the state": ("<=", 1.0),
    },
)
experiment = trained("latte", Layer(mixer="latte"))
