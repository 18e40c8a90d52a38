"""TRecViT: one of 9 patches flashes in one of the first 4 of 12 noisy frames, and the last frame says which.

striate bench papers/trecvit
"""

import jax
import optax
from _common import fit, report
from flax import linen as nn

from striate import Tokens
from striate.models.decoder import DecoderConfig, Layer
from striate.models.video import OVER_SPACE, OVER_TIME, TRecViT

FRAMES, EARLY, PATCHES, CHANNELS = 12, 4, 9, 4
NOISE = 0.2  # of a channel, where a flash adds 3


class Pointer(nn.Module):
    """Scores of the patches from the token of the last frame."""

    pattern: tuple[Layer, ...]

    @nn.compact
    def __call__(self, clip_BFNC):
        sizes = {"width": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "hidden": 64}
        config = DecoderConfig(pattern=self.pattern, layers=len(self.pattern), **sizes)
        hidden, _ = TRecViT(config)(clip_BFNC, Tokens.arange(*clip_BFNC.shape[:2]))
        return nn.Dense(PATCHES)(hidden[:, -1, -1])


def clips(key, count: int):
    """(clips, the patch that flashes in each)."""
    of_noise, of_frame, of_patch = jax.random.split(key, 3)
    frame = jax.random.randint(of_frame, (count, 1), 0, EARLY)
    patch = jax.random.randint(of_patch, (count, 1), 0, PATCHES)
    flash = jax.nn.one_hot(frame * PATCHES + patch, FRAMES * PATCHES).reshape(count, FRAMES, PATCHES, 1)
    return NOISE * jax.random.normal(of_noise, (count, FRAMES, PATCHES, CHANNELS)) + 3 * flash, patch[:, 0]


def accuracy(*pattern: Layer) -> float:
    model = Pointer(pattern)

    def loss(params, key):
        clip, patch = clips(key, 64)
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, clip), patch).mean()

    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), clips(jax.random.key(0), 1)[0]))
    params = fit(loss, params, 400, 3e-3, jax.random.key(1))
    clip, patch = clips(jax.random.key(2), 1024)
    return float((jax.jit(model.apply)(params, clip).argmax(-1) == patch).mean())


def measure() -> dict[str, float]:
    return {
        "accuracy of where there was a flash": accuracy(OVER_TIME, OVER_SPACE),
        "the same without recurrences over time": accuracy(OVER_SPACE),
    }


if __name__ == "__main__":
    report(__file__, measure)
