"""ARFlow: softmax attention inside an image, to both sides, and a gated linear state of the images before it.

It models velocities of noisy images, so that there is no experiment of the next token.
"""

from striate.configs.schema import System

system = System(
    paper="Hui et al. 2025, ARFlow",
    form='Layer(mixer="arflow", position="NoPE()")',
    tests="tests/lib/test_frames.py",
    asks={"velocity error after four points over that of the point alone": ("<=", 0.95)},
)
