"""Hydra: a recurrence over what is before a token, another one over what is after it, and a diagonal.

It sees later tokens, so that there is no experiment of the next token.
"""

from striate.configs.schema import System

system = System(
    paper="Hwang et al. 2024, Hydra",
    form='Layer(mixer="hydra")',
    tests="tests/models/test_bidirectional.py",
    asks={
        "accuracy on the nearest marker": (">=", 0.98),
        "the same of the forward recurrence alone": ("<=", 0.7),
    },
)
