"""Documents end to end as one stream of ids, and rows of that stream as a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from striate.lib.ngrams import ngram_ids
from striate.lib.text import BOUNDARY
from striate.lib.tokens import PADDING, Tokens


class Batch(NamedTuple):
    """B rows of T tokens: numpy arrays on the host, a pytree.

    inputs: int32 (B, T). targets: int32 (B, T), the id that follows each input. weights: float32 (B, T), 0 on padding.
    tokens: position and document of every input; both start at 0 in each row, and padding has document -1.
    ngrams: int32 (B, T, orders), hashed n-gram ids.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    tokens: Tokens
    ngrams: np.ndarray


class Stream:
    """The documents in one order, each led by BOUNDARY, end to end; any slice of it is found by bisection.

    Args:
      read: the bytes of document i.
      lengths: int (documents,), the number of its bytes.
      order: int (documents,), which document comes when.
    """

    def __init__(self, read: Callable[[int], bytes], lengths: np.ndarray, order: np.ndarray):
        self.read, self.order = read, order
        self.stops = np.cumsum(lengths[order] + 1)

    def __len__(self) -> int:
        return int(self.stops[-1]) if len(self.stops) else 0

    def cut(self, start: int, stop: int) -> np.ndarray:
        """int32 (stop - start,): ids start .. stop of the stream, PADDING past its end."""
        ids = np.full(stop - start, BOUNDARY, np.int32)
        ids[max(len(self) - start, 0) :] = PADDING
        first, last = np.searchsorted(self.stops, [start + 1, stop])
        for at in range(first, min(last + 1, len(self.stops))):
            text = np.frombuffer(self.read(self.order[at]), np.uint8)
            begin = self.stops[at] - len(text)  # its BOUNDARY is at begin - 1
            low, high = max(begin, start), min(self.stops[at], stop)
            if low < high:
                ids[low - start : high - start] = text[low - begin : high - begin]
        return ids


def pack(ids: np.ndarray, orders: Sequence[int], buckets: int) -> Batch:
    """The batch of rows of ids, int32 (B, T + 1): the first T are inputs, the last T targets; PADDING has no target."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    real = targets != PADDING
    index = np.arange(inputs.shape[1], dtype=np.int32)
    starts = (inputs == BOUNDARY) & (index > 0)
    position = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    document = np.where(real, np.cumsum(starts, axis=1, dtype=np.int32), np.int32(PADDING))
    inputs, targets = np.where(real, inputs, 0), np.where(real, targets, 0)
    tokens = Tokens(position=np.where(real, position, 0), document=document)
    return Batch(inputs, targets, real.astype(np.float32), tokens, ngram_ids(inputs, document, orders, buckets))
