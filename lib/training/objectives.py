"""Objectives: the cross-entropy of the next token, in chunks: logits (batch, length, vocabulary) never exist."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def token_losses(hidden_BTE, embedding_VE, targets_BT, chunk: int, sharding: NamedSharding | None = None):
    """-log p(target) of every token under softmax(hidden embedding^T).

    Each device takes its own tokens, `chunk` at a time, forward and (computed again) backward, and the gradient of the
    embedding is added up on the device first: nothing but the embedding and its gradient crosses devices.

    Args:
      hidden_BTE: final hidden states (batch, length, width).
      embedding_VE: the output table (vocabulary, width), cast to the dtype of `hidden_BTE`.
      targets_BT: int32 (batch, length), in the order of `hidden_BTE`.
      chunk: how many tokens have logits at the same time on a device.
      sharding: how (batch, length) are cut over a mesh; None for one device.

    Returns:
      float32 (batch, length); logits and their log-sum-exp are float32 too.
    """
    embedding_VE = embedding_VE.astype(hidden_BTE.dtype)
    if sharding is None:
        return _local_losses(hidden_BTE, embedding_VE, targets_BT, chunk)
    tokens = sharding.spec
    axes = tuple(axis for cut in tokens if cut for axis in ((cut,) if isinstance(cut, str) else cut))

    def local(hidden_BTE, embedding_VE, targets_BT):
        # From here on each device has an embedding of its own, whose gradient crosses devices once, after the chunks.
        return _local_losses(hidden_BTE, jax.lax.pcast(embedding_VE, axes, to="varying"), targets_BT, chunk)

    specs = {"in_specs": (tokens, PartitionSpec(), tokens), "out_specs": tokens}
    return jax.shard_map(local, mesh=sharding.mesh, axis_names=set(axes), **specs)(hidden_BTE, embedding_VE, targets_BT)


def _local_losses(hidden_BTE, embedding_VE, targets_BT, chunk):
    hidden_NE, targets_N = hidden_BTE.reshape(-1, hidden_BTE.shape[-1]), targets_BT.reshape(-1)
    whole = len(targets_N) // chunk * chunk

    @jax.checkpoint
    def losses(hidden_CE, targets_C):
        logits_CV = jnp.einsum("ce,ve->cv", hidden_CE, embedding_VE, preferred_element_type=jnp.float32)
        # A comparison and a sum, not a gather: its transpose is no scatter, and it may be cut along the vocabulary.
        hit_CV = jnp.arange(logits_CV.shape[1])[None] == targets_C[:, None]
        return jax.nn.logsumexp(logits_CV, axis=1) - jnp.where(hit_CV, logits_CV, 0.0).sum(axis=1)

    chunks = hidden_NE[:whole].reshape(-1, chunk, hidden_NE.shape[1]), targets_N[:whole].reshape(-1, chunk)
    losses_N = jax.lax.map(lambda xs: losses(*xs), chunks).reshape(whole)
    if whole < len(targets_N):
        losses_N = jnp.concatenate([losses_N, losses(hidden_NE[whole:], targets_N[whole:])])
    return losses_N.reshape(targets_BT.shape)
