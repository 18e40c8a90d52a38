"""Text as token ids: one id per byte, and one that starts every document."""

from __future__ import annotations

import numpy as np

BOUNDARY = 256
"""The id before the first byte of every document."""

VOCABULARY = 264
"""256 bytes, BOUNDARY, and 7 spare ids, so that 8 shards divide the embedding."""


def encode(text: str | bytes) -> np.ndarray:
    """The bytes of a text (UTF-8 for str) as int32 ids, shape (bytes,); no BOUNDARY is added."""
    raw = text.encode() if isinstance(text, str) else text
    return np.frombuffer(raw, np.uint8).astype(np.int32)


def decode(ids) -> bytes:
    """The bytes among integer ids of any shape, in order; BOUNDARY and the spare ids stand for nothing."""
    ids = np.asarray(ids).reshape(-1)
    return ids[(ids >= 0) & (ids < BOUNDARY)].astype(np.uint8).tobytes()
