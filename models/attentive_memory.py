"""Mixers that are softmax attention over a part of the sequence, and a state for the rest of it, as layers.

| mixer | layer of |
|---|---|
| lavo | LAVO (Zhang et al. 2023): a window, and the mean of all before it along orthonormal directions |
| arflow | ARFlow (Hui et al. 2025): a frame, to both sides, and a gated state of the frames before it |

Score and positions of a layer are read inside the part that it attends to.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from striate.lib.decoding.cache import Both, Carried, KeyValues
from striate.lib.frames import frame_attention
from striate.lib.orthogonal_memory import orthogonal_memory, orthonormal
from striate.lib.parallel.state_scan import RecurrenceParallel
from striate.lib.positions import NoPE, frequencies
from striate.lib.tokens import Tokens
from striate.models.layers import Attention, RMSNorm, heads_and_groups, queries_keys_values, rms_norm, weight
from striate.models.scores import parse as parse_score


class OrthogonalMemory(Attention):
    """`orthogonal_memory` with a learned basis, normalised, and with positions in it where the layer has any.

    Keys, which are the values too, have no norm: a token makes itself heard in a mean by its length.

    Attributes:
      window: tokens of a window.
      rank: numbers that the memory of a head has; None is head_dim.
    """

    recurrence: RecurrenceParallel | None = None
    window: int = 256
    rank: int | None = None

    @nn.compact
    def __call__(self, x_BTE: jax.Array, tokens: Tokens, k_tokens: Tokens, past: Both | None = None):
        """Arguments and results are those of `Attention`; what is cached are keys alone, and the states."""
        q_BTHD, x_BTKD = heads_and_groups(self, x_BTE, "qx", 1)
        rank = self.rank or self.head_dim
        initialise = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("kv_heads", None, "head_dim"))
        free_KRD = self.param("basis", initialise, (self.kv_heads, rank, self.head_dim), jnp.float32)
        out_BTHD, state = orthogonal_memory(
            RMSNorm(name="q_norm")(q_BTHD),
            x_BTKD if past is None else jnp.concatenate([past.attended.keys, x_BTKD], axis=1),
            orthonormal(free_KRD),
            window=self.window,
            normalise=True,
            frequency=None if isinstance(self.position, NoPE) else frequencies(2 * rank),
            position=self.position,
            mask=self.mask,
            score=parse_score(self.score)(self),
            tokens=tokens,
            k_tokens=k_tokens,
            initial_state=past and past.carried.state,
            return_state=True,
            implementation=self.implementation,
            parallel=self.parallel,
            recurrence=self.recurrence,
        )
        new = Both(KeyValues(x_BTKD, x_BTKD[..., :0]), Carried(state, None))
        return self.output(out_BTHD, x_BTE.shape[2]), new


class FrameAttention(Attention):
    """`frame_attention` of queries, keys and values of norm 1 over all heads, each head normed and gated after it.

    Attributes:
      mask: not read: a token sees all of its frame.
      frame: tokens of a frame. What is decoded together are whole frames.
    """

    recurrence: RecurrenceParallel | None = None
    frame: int = 64

    @nn.compact
    def __call__(self, x_BTE: jax.Array, tokens: Tokens, k_tokens: Tokens, past: Carried | None = None):
        """Arguments and results are those of `Attention`; what is cached is the state."""
        width = x_BTE.shape[2]
        q_BTHD, k_BTKD, v_BTKD = (_unit(x) for x in queries_keys_values(self, x_BTE))
        kernel = weight(self, "decay", (width, self.kv_heads), ("embed", "kv_heads"), width**-0.5)
        out_BTHD, state = frame_attention(
            self.position.queries(q_BTHD, tokens),
            self.position.keys(k_BTKD, tokens) * self.head_dim**-0.5,
            v_BTKD,
            nn.log_sigmoid((x_BTE @ kernel).astype(jnp.float32)) / 16,
            frame=self.frame,
            score=parse_score(self.score)(self),
            tokens=tokens,
            initial_state=past and past.state,
            return_state=True,
            implementation=self.implementation,
            parallel=self.parallel,
            recurrence=self.recurrence,
        )
        kernel = weight(self, "gate", (width, *q_BTHD.shape[2:]), ("embed", "heads", "head_dim"), width**-0.5)
        gate_BTHD = nn.silu(jnp.einsum("bte,ehd->bthd", x_BTE, kernel))
        return self.output(RMSNorm(name="out_norm")(out_BTHD) * gate_BTHD, width), Carried(state, None)


def _unit(x_BTHD):
    """x / rms(x), over all heads of a token."""
    return rms_norm(x_BTHD.reshape(*x_BTHD.shape[:2], -1), jnp.ones(())).reshape(x_BTHD.shape)
