"""CHELA: recall of two layers, and of the same without convolutions, where no key knows the token before it.

striate bench papers/chela
"""

from _common import accuracy, report, small

from striate.lib.training.data.tasks import Recall
from striate.models.convolutional import Chela
from striate.models.decoder import Layer
from striate.models.mixers import MIXERS, Kind

MIXERS["chela, one tap"] = Kind(Chela, {"taps": 1, "segment": 1, "scales": 1})


def recall(mixer: str) -> float:
    return accuracy(small(Recall(), *2 * [Layer(mixer=mixer)]), Recall())


def measure() -> dict[str, float]:
    return {"recall": recall("chela"), "recall without convolutions": recall("chela, one tap")}


if __name__ == "__main__":
    report(__file__, measure)
