"""Causal depthwise convolutions: short ones by their taps, long ones by FFT. No document sees another.

    y_t = sum over w of taps_w x_{t-w}, over the tokens of the segment of t

A segment is a stretch of one document, as for a recurrence (lib/recurrence.py): it ends where another document begins.
Tokens count by their place in the sequence; padding gives 0 and is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from striate.lib.errors import UserError
from striate.lib.recurrence import HIGHEST, segments
from striate.lib.tokens import PADDING, Tokens

BLOCK = 64  # tokens of a block, where a long convolution keeps documents apart

Form = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""How a sum over W taps is computed: (x (B, W - 1 + T, C), their documents, taps (W, C)) to y (B, T, C) of the last T.

x is wide, and 0 where padding is.
"""


class Tail(NamedTuple):
    """The last tokens so far, which the taps of a convolution still reach; not the padding at the end."""

    x: jax.Array  # (B, W - 1, C)
    document: jax.Array  # int32 (B, W - 1); PADDING where there was none

    @classmethod
    def empty(cls, x_BTC: jax.Array, size: int) -> Tail:
        (batch, _, channels), dtype = x_BTC.shape, x_BTC.dtype
        return cls(jnp.zeros((batch, size, channels), dtype), jnp.full((batch, size), PADDING, jnp.int32))

    @classmethod
    def of(cls, x_BTC: jax.Array, document_BT: jax.Array, size: int) -> Tail:
        length = document_BT.shape[1]
        end = jnp.where(document_BT == PADDING, 0, jnp.arange(1, length + 1)[None]).max(1)
        places = jnp.maximum(end, size)[:, None] - size + jnp.arange(size)[None]
        x = jnp.take_along_axis(x_BTC, places[..., None], axis=1)
        return cls(x, jnp.take_along_axis(document_BT, places, axis=1))


class Parallel(Protocol):
    """How a convolution crosses devices, on global arrays. Immutable, so that it can be static."""

    def convolve(self, form: Form, x_BTC, document_BT, taps_WC, tail: Tail | None) -> tuple[jax.Array, Tail]:
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
    return _convolution(_by_taps, x_BTC, taps_WC, tokens, initial_tail, return_tail, parallel)


def long_convolution(
    x_BTC: jax.Array,
    taps_WC: jax.Array,
    *,
    tokens: Tokens | None = None,
    initial_tail: Tail | None = None,
    return_tail: bool = False,
    parallel: Parallel | None = None,
):
    """`short_convolution` for many taps, up to as many as there are tokens.

    One document goes by FFT, in length log(length). Where Tokens say that there may be several it goes by blocks,
    in length x taps, since an FFT mixes the rounding errors of all that it transforms.
    """
    form = _by_fft if tokens is None else _by_blocks
    return _convolution(form, x_BTC, taps_WC, tokens, initial_tail, return_tail, parallel)


def multiscale_taps(segments_SWC: jax.Array, decay: float = 0.5) -> jax.Array:
    """Many taps of few parameters, smooth and fading: (W 2^(S-1), C), of segments (scales, W, C).

        taps_w = sum over scales i of decay^i segment_i(w / 2^i)

    Segment i is stretched over W 2^i tokens, linearly, and 0 beyond them.

    Source: Li et al. 2023 (SGConv), whose scales follow each other where these overlap.
    """
    scales, width, channels = segments_SWC.shape
    longest = width << (scales - 1)

    def stretched(i: int):
        taps = jax.image.resize(segments_SWC[i], (width << i, channels), "linear")
        return jnp.pad(decay**i * taps, ((0, longest - len(taps)), (0, 0)))

    return sum(stretched(i) for i in range(scales))


def _convolution(form: Form, x, taps, tokens, tail, return_tail: bool, parallel: Parallel | None):
    _check(x, taps, tokens)
    tokens = Tokens.arange(*x.shape[:2]) if tokens is None else tokens
    x = jnp.where(tokens.document[..., None] == PADDING, 0, x)
    y, tail = (parallel.convolve if parallel else convolve)(form, x, tokens.document, taps, tail)
    return (y, tail) if return_tail else y


def convolve(form: Form, x_BTC, document_BT, taps_WC, tail: Tail | None) -> tuple[jax.Array, Tail]:
    """(y, Tail) of tokens that follow those of a tail; x is 0 where padding is."""
    size, wide = taps_WC.shape[0] - 1, jnp.promote_types(x_BTC.dtype, jnp.float32)
    if tail is None:  # farther back than the length, taps reach nothing
        taps_WC, tail = taps_WC[: x_BTC.shape[1]], Tail.empty(x_BTC, size)
    x, document = (jnp.concatenate(pair, axis=1) for pair in zip(tail, (x_BTC, document_BT), strict=True))
    reached = size + 1 - taps_WC.shape[0]
    y = form(x[:, reached:].astype(wide), document[:, reached:], taps_WC.astype(wide))
    y = jnp.where(document_BT[..., None] == PADDING, 0, y).astype(x_BTC.dtype)
    return y, Tail.of(x, document, size)


def _by_taps(x, document, taps):
    reach = taps.shape[0] - 1
    segment = segments(document, document[:, 0])[1]

    def tap(distance: int):
        here, there = slice(reach, None), slice(reach - distance, x.shape[1] - distance)
        together = segment[:, here, None] == segment[:, there, None]
        return jnp.where(together, x[:, there], 0) * taps[distance, None, None]

    return sum(tap(distance) for distance in range(reach + 1))


def _by_fft(x, document, taps):
    length = x.shape[1]
    size = 2 ** (length - 1).bit_length()  # what wraps around falls on the W - 1 tokens ahead
    spectrum = jnp.fft.rfft(x, size, axis=1) * jnp.fft.rfft(taps, size, axis=0)[None]
    return jnp.fft.irfft(spectrum, size, axis=1)[:, taps.shape[0] - 1 : length]


def _by_blocks(x, document, taps):
    """Products of Toeplitz matrices with blocks of tokens: of halves of blocks, halves of these, ...; then of blocks.

    Of two blocks, one before the other, only one segment has tokens in both: that with which the later begins. So what
    is to be kept apart is set to 0 before a product and after it.
    """
    (batch, size, channels), reach = x.shape, taps.shape[0] - 1
    length = size - reach
    rows, ahead = min(BLOCK, 1 << (length - 1).bit_length()), -(-max(reach, 1) // BLOCK)
    blocks, before = -(-length // rows), ahead * BLOCK
    missing = before - reach, blocks * rows - length
    segment = segments(document, document[:, 0])[1]
    segment = jnp.pad(segment, ((0, 0), missing), constant_values=-1)
    x = jnp.pad(x.transpose(2, 0, 1), ((0, 0), (0, 0), missing))
    taps = jnp.pad(taps.T, ((0, 0), (0, before + BLOCK - reach - 1)))  # none reaches farther than there are

    def given(earlier, of, here, distance):
        """What blocks (C, B, n, j), of segments `of`, give to those that begin so many tokens later (C, B, n, i)."""
        apart = distance + jnp.arange(here.shape[2])[:, None] - jnp.arange(of.shape[2])[None]
        kept = jnp.where((of == here[..., :1])[None], earlier, 0)
        y = jnp.einsum("cij,cbnj->cbni", taps[:, apart], kept, precision=HIGHEST)
        return jnp.where((here == here[..., :1])[None], y, 0)

    own_x, own = x[..., before:], segment[:, before:]
    y = taps[:, :1, None] * own_x
    for half in (1 << level for level in range((rows - 1).bit_length())):
        early = own_x.reshape(channels, batch, -1, 2, half)[:, :, :, 0]
        of = own.reshape(batch, -1, 2, half)
        late = given(early, of[:, :, 0], of[:, :, 1], half)
        y = y.reshape(channels, batch, -1, 2, half).at[:, :, :, 1].add(late).reshape(y.shape)

    @jax.checkpoint
    def add(distance, y):
        """What comes from blocks so many before."""
        place = before - distance * BLOCK, blocks * BLOCK
        earlier, of = (jax.lax.dynamic_slice_in_dim(z, *place, z.ndim - 1) for z in (x, segment))
        earlier, of = (z.reshape(*z.shape[:-1], blocks, BLOCK) for z in (earlier, of))
        return y + given(earlier, of, own.reshape(batch, blocks, rows), distance * BLOCK)

    y = jax.lax.fori_loop(1, ahead + 1, add, y.reshape(channels, batch, blocks, rows))
    return y.reshape(channels, batch, -1).transpose(1, 2, 0)[:, :length]


def _check(x, taps, tokens) -> None:
    if x.ndim != 3 or taps.ndim != 2 or taps.shape[1] != x.shape[2] or taps.shape[0] < 1:
        raise UserError(
            f"x {x.shape} and taps {taps.shape} do not fit: a convolution needs (batch, length, channels) and (taps, "
            "channels), at least one tap."
        )
    if tokens is not None and tokens.shape != x.shape[:2]:
        raise UserError(f"tokens have shape {tokens.shape}; the arrays need (batch, length) = {x.shape[:2]}.")
