"""Causal depthwise convolutions: short ones by their taps, long ones by FFT. No document sees another.

    y_t = sum over w of taps_w x_{t-w}, over the tokens of the segment of t

A segment is a stretch of one document, as for a recurrence (lib/recurrence.py): it ends where another document begins.
Tokens count by their place in the sequence; padding gives 0 and is 0.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from striate.lib.errors import UserError
from striate.lib.recurrence import segments
from striate.lib.tokens import PADDING, Tokens

BLOCK = 64  # tokens of a block, where a long convolution keeps documents apart


class Tail(NamedTuple):
    """The last tokens so far, which the taps of a short convolution still reach; not the padding at the end."""

    x: jax.Array  # (B, W - 1, C)
    document: jax.Array  # int32 (B, W - 1); PADDING where there was none

    @classmethod
    def empty(cls, x_BTC: jax.Array, taps_WC: jax.Array) -> Tail:
        shape = x_BTC.shape[0], taps_WC.shape[0] - 1
        return cls(jnp.zeros((*shape, x_BTC.shape[2]), x_BTC.dtype), jnp.full(shape, PADDING, jnp.int32))

    @classmethod
    def of(cls, x_BTC: jax.Array, document_BT: jax.Array, size: int) -> Tail:
        length = document_BT.shape[1]
        end = jnp.where(document_BT == PADDING, 0, jnp.arange(1, length + 1)[None]).max(1)
        places = jnp.maximum(end, size)[:, None] - size + jnp.arange(size)[None]
        x = jnp.take_along_axis(x_BTC, places[..., None], axis=1)
        return cls(x, jnp.take_along_axis(document_BT, places, axis=1))


class Parallel(Protocol):
    """How a convolution crosses devices, on global arrays. Immutable, so that it can be static."""

    def convolve(self, x_BTC, document_BT, taps_WC, tail: Tail) -> tuple[jax.Array, Tail]:
        """`convolve` of this file."""


def short_convolution(
    x_BTC: jax.Array,
    taps_WC: jax.Array,
    *,
    tokens: Tokens | None = None,
    initial_tail: Tail | None = None,
    return_tail: bool = False,
    parallel: Parallel | None = None,
):
    """The convolution of this file, tap by tap: W multiplications for every number.

    Args:
      x_BTC: (batch, length, channels), a floating dtype.
      taps_WC: (taps, channels): the first is that of the token itself, the second that of the one before it.
      tokens: whose documents keep apart, in the order of the sequence; None is one document.
      initial_tail: what came before.
      return_tail: also return the Tail after the last token.
      parallel: how the sequence crosses devices (striate.parallel.StateScan, ...); None leaves it on each.

    Returns:
      y (batch, length, channels) in the dtype of x, sums in float32; with return_tail also the Tail.

    Raises:
      UserError: shapes that do not fit.
    """
    tokens = _check(x_BTC, taps_WC, tokens)
    tail = Tail.empty(x_BTC, taps_WC) if initial_tail is None else initial_tail
    x_BTC = jnp.where(tokens.document[..., None] == PADDING, 0, x_BTC)
    y, tail = (parallel.convolve if parallel else convolve)(x_BTC, tokens.document, taps_WC, tail)
    return (y, tail) if return_tail else y


def convolve(x_BTC, document_BT, taps_WC, tail: Tail) -> tuple[jax.Array, Tail]:
    """(y, Tail) of tokens that follow those of a tail; x is 0 where padding is."""
    reach, length = taps_WC.shape[0] - 1, x_BTC.shape[1]
    x, document = (jnp.concatenate(pair, axis=1) for pair in zip(tail, (x_BTC, document_BT), strict=True))
    segment = segments(document, document[:, 0])[1]
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def tap(distance: int):
        here, there = slice(reach, reach + length), slice(reach - distance, reach - distance + length)
        together = segment[:, here, None] == segment[:, there, None]
        return jnp.where(together, wide[:, there], 0) * taps_WC[distance, None, None].astype(wide.dtype)

    y = sum(tap(distance) for distance in range(reach + 1))
    y = jnp.where(document_BT[..., None] == PADDING, 0, y).astype(x_BTC.dtype)
    return y, Tail.of(x, document, reach)


def long_convolution(x_BTC: jax.Array, taps_LC: jax.Array, *, tokens: Tokens | None = None):
    """The convolution of this file for taps as many as tokens.

    One document goes by FFT, in length log(length). Where Tokens say that there may be several it goes by blocks,
    in length^2, since an FFT mixes the rounding errors of all that it transforms.

    Args:
      x_BTC: (batch, length, channels), a floating dtype.
      taps_LC: (taps, channels), any number of them; those beyond the length are not reached.
      tokens: whose documents keep apart, in the order of the sequence; None is one document.

    Returns:
      y (batch, length, channels) in the dtype of x; computed in float32.

    Raises:
      UserError: shapes that do not fit.
    """
    one_document, length = tokens is None, x_BTC.shape[1]
    tokens = _check(x_BTC, taps_LC, tokens)
    wide = jnp.promote_types(x_BTC.dtype, jnp.float32)
    x, taps = x_BTC.astype(wide), taps_LC[:length].astype(wide)
    if one_document:
        size = 2 ** (length + len(taps) - 2).bit_length()  # long enough not to wrap around
        spectrum = jnp.fft.rfft(x, size, axis=1) * jnp.fft.rfft(taps, size, axis=0)[None]
        return jnp.fft.irfft(spectrum, size, axis=1)[:, :length].astype(x_BTC.dtype)
    return _by_blocks(x, taps, tokens.document).astype(x_BTC.dtype)


def _by_blocks(x_BTC, taps_LC, document_BT):
    """Blocks of BLOCK x BLOCK pairs at a time: Toeplitz in the distance, 0 between segments."""
    batch, length, channels = x_BTC.shape
    missing = -length % BLOCK
    blocks, reach = (length + missing) // BLOCK, taps_LC.shape[0]
    segment = jnp.pad(segments(document_BT, document_BT[:, 0])[1], ((0, 0), (0, missing)), constant_values=-1)
    real = jnp.pad(document_BT != PADDING, ((0, 0), (0, missing)))
    x = jnp.where(real[..., None], jnp.pad(x_BTC, ((0, 0), (0, missing), (0, 0))), 0).reshape(batch, blocks, BLOCK, -1)
    # No tap looks ahead, and none farther back than there are taps.
    taps = jnp.pad(taps_LC, ((BLOCK - 1, max(blocks * BLOCK + BLOCK - reach, 0)), (0, 0)))
    segment = segment.reshape(batch, blocks, BLOCK)
    apart = jnp.arange(BLOCK)[:, None] - jnp.arange(BLOCK)[None] + BLOCK - 1

    def add(distance, y):
        """The pairs whose blocks are so far apart."""
        toeplitz = jax.lax.dynamic_slice_in_dim(taps, distance * BLOCK, 2 * BLOCK - 1, 0)[apart]  # (i, j, C)
        earlier, of = jnp.roll(x, distance, axis=1), jnp.roll(segment, distance, axis=1)
        exists = jnp.arange(blocks) >= distance
        together = (segment[..., None] == of[:, :, None]) & exists[None, :, None, None]

        def block(pairs):
            together, earlier = pairs
            return jnp.einsum("bij,ijc,bjc->bic", together.astype(x.dtype), toeplitz, earlier)

        return y + jax.lax.map(block, (together.swapaxes(0, 1), earlier.swapaxes(0, 1))).swapaxes(0, 1)

    y = jax.lax.fori_loop(0, min(blocks, -(-reach // BLOCK) + 1), add, jnp.zeros_like(x))
    return jnp.where(real[..., None], y.reshape(batch, -1, channels), 0)[:, :length]


def _check(x, taps, tokens) -> Tokens:
    if x.ndim != 3 or taps.ndim != 2 or taps.shape[1] != x.shape[2] or taps.shape[0] < 1:
        raise UserError(
            f"x {x.shape} and taps {taps.shape} do not fit: a convolution needs (batch, length, channels) and (taps, "
            "channels), at least one tap."
        )
    if tokens is not None and tokens.shape != x.shape[:2]:
        raise UserError(f"tokens have shape {tokens.shape}; the arrays need (batch, length) = {x.shape[:2]}.")
    return Tokens.arange(*x.shape[:2]) if tokens is None else tokens
