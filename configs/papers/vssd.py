"""VSSD: one state, which all tokens write with a strength of their own and all read, over a sequence.

It sees later tokens, so that there is no experiment of the next token.
"""

from striate.configs.schema import System

system = System(
    paper="Shi et al. 2024, VSSD",
    form='Layer(mixer="vssd")',
    tests="tests/models/test_bidirectional.py",
    asks={
        "error of a mean over all tokens at the first quarter": ("<=", 0.08),
        "times that of the causal recurrence": (">=", 3.0),
    },
)
