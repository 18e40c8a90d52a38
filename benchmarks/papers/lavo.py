"""LAVO: what the first four tokens of 512 were, asked at the last, with windows of 64 and a memory of those before.

Four tokens are little of a mean over hundreds, as long as a model does not know which of them are noise: it learns that
from rows of two windows first. The model without a memory sees the last 64 tokens.

striate bench papers/lavo
"""

import dataclasses

from _common import accuracy, report, small, trained

from striate.lib.training.data.tasks import Topic
from striate.models.decoder import Layer
from striate.models.mixers import MIXERS

WINDOW = 64


def reached(layer: Layer) -> float:
    config = small(Topic(), layer)
    params = trained(config, Topic(length=2 * WINDOW), steps=400, batch=32)
    return accuracy(config, Topic(), params=params, steps=400, batch=32)


def measure() -> dict[str, float]:
    MIXERS["lavo"] = dataclasses.replace(MIXERS["lavo"], options={"window": WINDOW})
    return {
        "accuracy with the memory": reached(Layer(mixer="lavo", position="NoPE()")),
        "with the window alone": reached(Layer(mask=f"window({WINDOW - 1}) & same('document')")),
    }


if __name__ == "__main__":
    report(__file__, measure)
