"""One linear layer that takes a step of gradient descent on what it has seen so far."""

from striate.configs.schema import System

system = System(
    paper="Zheng et al. 2024, On mesa-optimization in autoregressively trained transformers",
    form="striate.lib.linear_variants.least_squares_step",
    tests="tests/lib/test_linear_variants.py",
    asks={f"learned step over the best one, off by: {start}": ("<=", 0.03) for start in ("ones", "sparse", "gaussian")},
)
