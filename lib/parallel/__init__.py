"""How mixers cross devices: Ring and AllGather for softmax attention."""

from striate.lib.parallel.gather import AllGather
from striate.lib.parallel.ring import Ring

__all__ = ["AllGather", "Ring"]
