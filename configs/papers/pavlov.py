"""Linear attention as an associative memory: how well it brings back what was stored, and that a law says so."""

from striate.configs.schema import System

system = System(
    paper="Qiao 2025, Understanding Transformers through the Lens of Pavlovian Conditioning",
    form="lib.analysis.associations.retrieved(linear_attention, keys, values)",
    tests="tests/lib/analysis/test_associations.py",
    asks={
        "squared error over its law less 1, most": ("<=", 0.08),
        "cosine less its law, most": ("<=", 0.02),
    },
)
