"""TRecViT: a gated recurrence over time at every place of a frame, and attention over the places of a frame.

It reads videos, so that there is no experiment of the next token.
"""

from striate.configs.schema import System

system = System(
    paper="Patraucean et al. 2024, TRecViT",
    form="models.video.TRecViT(DecoderConfig(pattern=(OVER_TIME, OVER_SPACE)))",
    tests="tests/models/test_video.py",
    asks={
        "accuracy of where there was a flash": (">=", 0.95),
        "the same without recurrences over time": ("<=", 0.2),
    },
)
