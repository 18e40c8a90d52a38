"""Gated Associative Memory's layers in the model of configs/stdlib.py. They see 2 tokens back each: a control.

striate train configs/papers/gam.py
"""

from striate.configs.papers.base import trained
from striate.configs.schema import System
from striate.models.decoder import Layer

system = System(
    paper="Acharya 2025, Gated associative memory: a parallel O(N) architecture for efficient sequence modeling",
    form='Layer(mixer="gam"); its bank: read_bank',
    tests="tests/models/test_convolutional.py",
    asks={
        "recall over more than 12 tokens": ("<=", 0.25),
        "the same of a linear recurrence": (">=", 0.99),
        "cost of a token, dearest over cheapest length": ("<=", 1.5),
    },
)
experiment = trained("gam", Layer(mixer="gam"))
