"""Hashed n-grams: cheap ids for the few tokens that end at each token, looked up in tables beside the embedding.

The ids are computed in natural order (on the host for training, inside the loop for generation), so that a model that
reads them never looks at its neighbours and works in any token order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MULTIPLIER = np.uint32(0x9E3779B1)  # 2^32 / golden ratio, made odd: consecutive products spread over all 32 bits


def ngram_ids(inputs_BT, document_BT, orders: Sequence[int], buckets: int):
    """The hash of the n tokens that end at each token, for each n in `orders`.

    A rolling polynomial hash modulo 2^32, its bits mixed, modulo `buckets`. An n-gram never reaches over the start of
    its document: there it is the hash of the shorter n-gram.

    Args:
      inputs_BT: token ids, int32 (batch, length), natural order; a numpy or a JAX array.
      document_BT: the document of each token, int32 (batch, length).
      orders: the n of the n-grams, each >= 1.
      buckets: ids lie in 0 .. buckets - 1.

    Returns:
      int32 (batch, length, len(orders)), of the same kind of array as `inputs_BT`.

    Source: Pagnoni et al. 2024 (Byte Latent Transformer), section 3.2.1.
    """
    if not orders:
        return inputs_BT[:, :, None][:, :, :0]
    xp = inputs_BT.__array_namespace__()
    symbol_BT = inputs_BT.astype("uint32") + 1  # 0 stands for "before the document"
    index_1T = xp.arange(inputs_BT.shape[1])[None]
    hash_BT, ids = xp.zeros_like(symbol_BT), {}
    for back in range(max(orders)):
        inside = (xp.roll(document_BT, back, axis=1) == document_BT) & (index_1T >= back)
        hash_BT = hash_BT * _MULTIPLIER + xp.where(inside, xp.roll(symbol_BT, back, axis=1), np.uint32(0))
        ids[back + 1] = (_mix(hash_BT) % np.uint32(buckets)).astype("int32")
    return xp.stack([ids[n] for n in orders], axis=-1)


def _mix(hash_BT):
    """Lets the high bits reach the low ones, which alone choose a bucket when the buckets are a power of two."""
    hash_BT = (hash_BT ^ (hash_BT >> 16)) * np.uint32(0x85EBCA6B)
    return hash_BT ^ (hash_BT >> 13)
