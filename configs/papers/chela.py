"""CHELA's layers in the model of configs/stdlib.py: MEGA's gates and a linear attention behind two convolutions.

striate train configs/papers/chela.py
"""

from striate.configs.papers.base import trained
from striate.configs.schema import System
from striate.models.decoder import Layer

system = System(
    paper="Liu et al. 2024, CHELA: Short-long convolutions help hardware-efficient linear attention",
    form='Layer(mixer="chela"); its convolutions: short_convolution, long_convolution of multiscale_taps',
    tests="tests/models/test_convolutional.py",
    asks={"recall": (">=", 0.99), "recall without convolutions": ("<=", 0.35)},
)
experiment = trained("chela", Layer(mixer="chela"))
