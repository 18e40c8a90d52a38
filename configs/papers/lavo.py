"""LAVO, in its style: windows of 256 tokens and a normalised memory of those before, in the model of configs/stdlib.py.

striate train configs/papers/lavo.py
"""

from striate.configs.papers.base import trained
from striate.configs.schema import System
from striate.models.decoder import Layer

system = System(
    paper="Zhang et al. 2023, Linear Attention via Orthogonal Memory",
    form='Layer(mixer="lavo")',
    tests="tests/lib/test_orthogonal_memory.py",
    asks={"accuracy with the memory": (">=", 0.95), "with the window alone": ("<=", 0.2)},
)
experiment = trained("lavo", Layer(mixer="lavo"))
