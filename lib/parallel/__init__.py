"""How mixers cross devices: Ring, AllGather, Ulysses and RingUlysses for softmax attention; StateScan, ReorderedScan
and ValueColumns for linear recurrences; and the choice between them."""

from striate.lib.parallel.across import Across
from striate.lib.parallel.choose import HARDWARE, Hardware, choose
from striate.lib.parallel.gather import AllGather
from striate.lib.parallel.hybrid import Recurrent
from striate.lib.parallel.ring import Ring
from striate.lib.parallel.state_scan import ReorderedScan, StateScan, ValueColumns
from striate.lib.parallel.ulysses import RingUlysses, Ulysses

__all__ = [
    "HARDWARE",
    "Across",
    "AllGather",
    "Hardware",
    "Recurrent",
    "ReorderedScan",
    "Ring",
    "RingUlysses",
    "StateScan",
    "Ulysses",
    "ValueColumns",
    "choose",
]
