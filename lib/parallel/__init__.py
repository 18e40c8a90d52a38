"""How mixers cross devices: Ring, AllGather, Ulysses and RingUlysses for softmax attention."""

from striate.lib.parallel.gather import AllGather
from striate.lib.parallel.ring import Ring
from striate.lib.parallel.ulysses import RingUlysses, Ulysses

__all__ = ["AllGather", "Ring", "RingUlysses", "Ulysses"]
