"""HiSS: two stacks at two rates, the low one over the samples of a chunk, the high one over what is left of each chunk.

It reads and gives vectors, so that there is no experiment of the next token.
"""

from striate.configs.schema import System

system = System(
    paper="Bhirangi et al. 2024, HiSS",
    form="models.continuous.HiSS(low, high, chunk=10, outputs=1)",
    tests="tests/models/test_continuous.py",
    asks={
        "error of a sum over chunks": ("<=", 0.5),
        "the same without the high level": (">=", 0.9),
    },
)
