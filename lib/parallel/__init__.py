"""How mixers cross devices: Ring, AllGather, Ulysses and RingUlysses for softmax attention, and the choice of one."""

from striate.lib.parallel.choose import HARDWARE, Hardware, choose
from striate.lib.parallel.gather import AllGather
from striate.lib.parallel.ring import Ring
from striate.lib.parallel.ulysses import RingUlysses, Ulysses

__all__ = ["HARDWARE", "AllGather", "Hardware", "Ring", "RingUlysses", "Ulysses", "choose"]
