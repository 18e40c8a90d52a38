"""LightNet's layers in the model of configs/stdlib.py: a running softmax in every channel of the keys.

striate train configs/papers/lightnet.py
"""

from striate.configs.papers.base import trained
from striate.configs.schema import System
from striate.models.decoder import Layer

system = System(
    paper="Qin et al. 2024, You only scan once (LightNet)",
    form='Layer(mixer="lightnet"); to both sides global_softmax(silu(q), k, v)',
    tests="tests/lib/test_linear_variants.py",
    asks={
        "influence of the first token at 4096, over 1 / 4096": (">=", 0.9999),
        "the same of a decay of 0.99": ("<=", 1e-14),
        "corners of an image that one pass to both sides sees, least": (">=", 4),
    },
)
experiment = trained("lightnet", Layer(mixer="lightnet"))
