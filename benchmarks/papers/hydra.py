"""Hydra: each token names the nearest marker at it or after it, which a recurrence over the tokens before cannot know.

striate bench papers/hydra
"""

from _common import accuracy, report, small

from striate.lib.training.data.tasks import NearestMarker
from striate.models.decoder import Layer


def measure() -> dict[str, float]:
    def reached(mixer: str) -> float:
        sizes = {"width": 32, "heads": 8, "kv_heads": 1, "head_dim": 8, "hidden": 64}
        return accuracy(small(task, Layer(mixer=mixer), **sizes), task)

    task = NearestMarker()
    return {
        "accuracy on the nearest marker": reached("hydra"),
        "the same of the forward recurrence alone": reached("gated_linear"),
    }


if __name__ == "__main__":
    report(__file__, measure)
