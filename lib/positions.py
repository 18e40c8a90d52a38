"""Positions that enter through queries, keys or embeddings: read from Tokens, so any token order gives the same result.

All but the sinusoidal ones, which are added to embeddings, make the product of a query and a key depend on the
difference of their positions alone. A pair of dims (x[d], x[d + F]) is a complex number, turned by the angle

    a_d = sum over axes of position[axis] * frequency[axis, d]

so that <turned q, turned k> = Re sum_d q_d conj(k_d) e^(i (a_d(query) - a_d(key))). RoPE, its scalings to longer texts,
partial, 2-D and 3-D RoPE and learned frequencies differ in nothing but the array `frequency`.

A model names its positions by a `Position`, a frozen value that prints as text which `parse` reads back.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import numbers
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from striate.lib.errors import UserError
from striate.lib.tokens import Tokens


class Checked:
    """A frozen dataclass that refuses values of the wrong kind."""

    def __post_init__(self):
        kinds = {
            "float": (numbers.Real, "a number greater than 0"),
            "int": (numbers.Integral, "a whole number greater than 0"),
            "tuple": (tuple, "a tuple"),
            "Scaling | None": (Scaling | None, "Linear, NTK, YaRN or None"),
        }
        for field in dataclasses.fields(self):
            value, (kind, words) = getattr(self, field.name), kinds[field.type.partition("[")[0]]
            if not isinstance(value, kind) or (isinstance(value, numbers.Real) and value <= 0):
                raise UserError(f"{type(self).__name__}({field.name}={value!r}) cannot be: {field.name} is {words}.")


class Scaling(Checked):
    """How frequencies are slowed, for texts longer than those that a model was trained on."""

    temperature = 1.0
    """Logits are divided by this."""

    def frequencies(self, dim: int, theta: float) -> jax.Array:
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation (Chen et al. 2023): every pair is slowed by `factor`."""

    factor: float

    def frequencies(self, dim: int, theta: float) -> jax.Array:
        return frequencies(dim, theta) / self.factor


@dataclass(frozen=True)
class NTK(Scaling):
    """NTK-aware interpolation (Peng et al. 2023, section 3.1): a greater theta, which slows the slowest pair by
    `factor` and leaves the fastest alone."""

    factor: float

    def frequencies(self, dim: int, theta: float) -> jax.Array:
        if dim == 2:
            raise UserError("NTK slows the slowest pair of dims and not the fastest: it needs 4 dims or more, got 2.")
        return frequencies(dim, theta * self.factor ** (dim / (dim - 2)))


@dataclass(frozen=True)
class YaRN(Scaling):
    """YaRN (Peng et al. 2023, sections 3.2 to 3.4): pairs that turn `fast` times or more in `length` tokens stay as
    they are, those that turn `slow` times or less are slowed by `factor`, and a ramp, linear in the turns, joins them.

    Attributes:
      factor: how many times longer the text may be.
      length: tokens of the texts that the model was trained on.
    """

    factor: float
    length: int
    slow: float = 1.0
    fast: float = 32.0

    def __post_init__(self):
        super().__post_init__()
        if self.slow >= self.fast:
            raise UserError(f"{self} cannot be: slow is less than fast.")

    @property
    def temperature(self) -> float:
        """(0.1 ln factor + 1)^-2"""
        return (0.1 * math.log(max(self.factor, 1.0)) + 1.0) ** -2

    def frequencies(self, dim: int, theta: float) -> jax.Array:
        frequency_F = frequencies(dim, theta)
        turns_F = self.length / (2 * math.pi) * frequency_F
        kept_F = jnp.clip((turns_F - self.slow) / (self.fast - self.slow), 0.0, 1.0)
        return frequency_F * (kept_F + (1.0 - kept_F) / self.factor)


def frequencies(dim: int, theta: float = 10_000.0, scaling: Scaling | None = None) -> jax.Array:
    """Radians per position, float32 (dim / 2,), for the pairs of `dim` dims: theta^(-2d / dim), then scaled.

    Where dim is less than the width of a head, the dims from `dim` on are left alone (partial rotary). A scaling may
    ask for logits to be divided by `scaling.temperature`, which is not 1 for YaRN.

    Raises:
      UserError: dim is odd, or less than 2.

    Source: Su et al. 2021 (RoFormer), section 3.2.
    """
    half, odd = divmod(dim, 2)
    if odd or half < 1:
        near = f"{dim - 1} or {dim + 1}" if dim > 2 else "2"
        raise UserError(f"Rotary positions turn pairs of dims and got {dim}, which is no multiple of 2: use {near}.")
    if scaling is not None:
        return scaling.frequencies(dim, theta)
    return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)


def per_axis(*frequencies_F: jax.Array) -> jax.Array:
    """Frequencies of several axes, (axes, F): each axis turns the pairs of its own list, the lists one after the other.

    `per_axis(frequencies(16), frequencies(24), frequencies(24))` is 3-D RoPE, each axis with all speeds;
    `per_axis(*jnp.split(frequencies(64), 2))` deals one list out to two axes (MD-LRPE; Qin et al. 2024, LightNet).
    """
    return jax.scipy.linalg.block_diag(*frequencies_F).reshape(len(frequencies_F), -1)


def rope(x_BTHD: jax.Array, position: jax.Array, frequency: jax.Array | None = None) -> jax.Array:
    """Rotary position embedding, halves form: pair (x[d], x[d + F]) turns by the angle position * frequency[d].

    Args:
      x_BTHD: queries or keys, (batch, length, heads, head_dim).
      position: int32 or float32, (batch, length), or (batch, length, axes) for several.
      frequency: float32, given or learned: (F,), or (axes, F) for several; (heads, F) or (axes, heads, F) where heads
        differ. None is `frequencies(head_dim)`. Dims from 2 F on are left alone.

    Returns:
      The rotated array, in the shape and dtype of `x_BTHD`. Angles are float32 products: an angle of a radians is known
      to (a + 1) 2^-23, for the fastest pairs 0.004 at position 2^15 and 0.1 at 10^6; half of that differs from position
      to position. From 2^24 on, neighbouring positions are no longer told apart.

    Raises:
      UserError: shapes that do not fit, or more frequencies than pairs.

    Source: Su et al. 2021 (RoFormer), section 3.2; frequencies learned per head and axis: Heo et al. 2024 (RoPE-Mixed).
    """
    frequency = frequencies(x_BTHD.shape[-1]) if frequency is None else frequency
    angle_BTHF = _angles(x_BTHD, position, frequency)
    return _turn(x_BTHD, jnp.cos(angle_BTHF), jnp.sin(angle_BTHF))


def xpos(
    x_BTHD: jax.Array,
    position_BT: jax.Array,
    role: str,
    span: tuple[int, int],
    frequency: jax.Array | None = None,
    base: float = 512.0,
    gamma: float = 0.4,
) -> jax.Array:
    """xPos: `rope`, and pair d of a query at n is scaled by zeta_d^((n - c) / base), of a key by the inverse.

    So their product decays by zeta_d^((n - m) / base), where zeta_d = (d / F + gamma) / (1 + gamma): slow pairs least.
    It does not depend on c, the middle of `span`, which keeps the scales in range. Those are at most
    2^(reach / base * log2(1 + 1 / gamma)), reach = half of the span, and may be 2^60 in float32 and bfloat16 (2^4 in
    float16), so that the product even of a pair that is hidden is less than 2^120 |q| |k|. With the defaults that
    allows a span of 33 994 positions; it grows with `base`.

    Args:
      x_BTHD: queries or keys, (batch, length, heads, head_dim).
      position_BT: int32 or float32, (batch, length).
      role: "query" or "key".
      span: the least and the greatest position that occur among queries and keys, the same for both.
      frequency: as for `rope`, of one axis.
      base: positions for which the scale of pair d is zeta_d.
      gamma: the greater, the less it decays.

    Raises:
      UserError: a span whose scales overflow, positions (where they are known before compiling) outside of it, or an
        unknown role.

    Source: Sun et al. 2023 (A Length-Extrapolatable Transformer), algorithm 1.
    """
    if role not in ("query", "key"):
        raise UserError(f"xpos got the role {role!r}; it is 'query' or 'key', which are scaled inversely.")
    check_span(span, x_BTHD.dtype, base, gamma)
    _check_inside(position_BT, span)
    frequency = frequencies(x_BTHD.shape[-1]) if frequency is None else frequency
    angle_BTHF = _angles(x_BTHD, position_BT, frequency)
    pairs = angle_BTHF.shape[-1]
    log_zeta_F = jnp.log((jnp.arange(pairs, dtype=jnp.float32) / pairs + gamma) / (1 + gamma))
    power_BT = (position_BT.astype(jnp.float32) - sum(span) / 2) / (base if role == "query" else -base)
    scale_BT1F = jnp.exp(power_BT[:, :, None, None] * log_zeta_F[None, None, None])
    return _turn(x_BTHD, scale_BT1F * jnp.cos(angle_BTHF), scale_BT1F * jnp.sin(angle_BTHF))


def lrpe(x_BTHD: jax.Array, position: jax.Array, frequency: jax.Array | None = None) -> jax.Array:
    """Linearised relative positions, cosine form: (x cos a, x sin a), twice as wide, each dim d with its own angle.

    The product of a query and a key is sum_d q_d k_d cos(a_d(query) - a_d(key)): no dim is paired with another, which
    suits the features of linear attention. Arguments are those of `rope`, with a frequency for every dim; None is
    `frequencies(2 head_dim)`.

    Raises:
      UserError: shapes that do not fit, or another number of frequencies than dims.

    Source: Qin et al. 2023 (Linearized Relative Positional Encoding); with several axes Qin et al. 2024 (LightNet).
    """
    width = x_BTHD.shape[-1]
    frequency = frequencies(2 * width) if frequency is None else frequency
    if frequency.shape[-1] != width:
        raise UserError(
            f"lrpe got {frequency.shape[-1]} frequencies for {width} dims; it needs one for each: {width}, as "
            f"frequencies({2 * width}) gives them."
        )
    angle_BTHD, wide = _angles(x_BTHD, position, frequency), x_BTHD.astype(jnp.float32)
    return jnp.concatenate([wide * jnp.cos(angle_BTHD), wide * jnp.sin(angle_BTHD)], axis=-1).astype(x_BTHD.dtype)


def temporal(tokens: Tokens, name: str = "frame") -> jax.Array:
    """The time of every token, int32 (batch, length): its position, less the tokens so far that took no time.

    In a document, in the order of its positions, a token takes no time where it has the same `name` as the one before
    and that is 0 or more: the tokens of a frame share one time, and text (-1, or a number for each token) steps by one.
    Positions within a document are distinct; the tokens stand in any order.
    """
    order_BT = jnp.lexsort((tokens.position, tokens.document), axis=-1)
    document, position, frame = (
        jnp.take_along_axis(x, order_BT, axis=1) for x in (tokens.document, tokens.position, _field(tokens, name))
    )
    same = document[:, 1:] == document[:, :-1]
    takes_none = same & (frame[:, 1:] == frame[:, :-1]) & (frame[:, 1:] >= 0)
    so_far_BT = jnp.pad(jnp.cumsum(takes_none, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    before_document_BT = jax.lax.cummax(jnp.where(jnp.pad(same, ((0, 0), (1, 0))), 0, so_far_BT), axis=1)
    time_BT = position - (so_far_BT - before_document_BT)
    return jnp.take_along_axis(time_BT, jnp.argsort(order_BT, axis=1), axis=1)


def dual(tokens: Tokens, gamma: float = 1.0, name: str = "frame") -> jax.Array:
    """Positions of temporal dual RoPE, float32 (batch, length): position + gamma * `temporal(tokens, name)`.

    Rotations compose by adding their angles, so `rope(x, dual(tokens))` turns once by the order of all tokens and once
    by time.

    Source: Gao et al. 2024 (TC-LLaVA).
    """
    return tokens.position.astype(jnp.float32) + gamma * temporal(tokens, name).astype(jnp.float32)


def sinusoidal(position_BT: jax.Array, width: int, theta: float = 10_000.0) -> jax.Array:
    """Sinusoidal absolute positions, float32 (batch, length, width), sines first: to be added to embeddings.

    Source: Vaswani et al. 2017, section 3.5; there sines and cosines take turns, which is another order of the dims.
    """
    angle_BTF = position_BT[:, :, None].astype(jnp.float32) * frequencies(width, theta)[None, None]
    return jnp.concatenate([jnp.sin(angle_BTF), jnp.cos(angle_BTF)], axis=-1)


class Position(Checked):
    """How a layer of attention tells its queries and keys where they are."""

    def check(self, head_dim: int) -> None:
        """Raises UserError where heads of this width cannot have such positions."""

    def queries(self, q_BTHD: jax.Array, tokens: Tokens) -> jax.Array:
        return q_BTHD

    def keys(self, k_BTHD: jax.Array, tokens: Tokens) -> jax.Array:
        return k_BTHD


@dataclass(frozen=True)
class NoPE(Position):
    """Nothing: order is told by the mask alone (Kazemnejad et al. 2023)."""


@dataclass(frozen=True)
class Rope(Position):
    """`rope` by one field of the Tokens, or by several.

    Attributes:
      theta: base of the frequencies.
      dims: how many dims of a head turn by each field; () is all of them, in equal parts.
      fields: of the Tokens.
      scaling: Linear, NTK or YaRN; queries are divided by its temperature.
    """

    theta: float = 10_000.0
    dims: tuple[int, ...] = ()
    fields: tuple[str, ...] = ("position",)
    scaling: Scaling | None = None

    def check(self, head_dim):
        jax.eval_shape(lambda: self._frequencies(head_dim))

    def queries(self, q_BTHD, tokens):
        turned_BTHD = self.keys(q_BTHD, tokens)
        return turned_BTHD / self.scaling.temperature if self.scaling else turned_BTHD

    def keys(self, k_BTHD, tokens):
        position_BTA = jnp.stack([_field(tokens, name) for name in self.fields], axis=-1)
        return rope(k_BTHD, position_BTA, self._frequencies(k_BTHD.shape[-1]))

    def _frequencies(self, head_dim: int) -> jax.Array:
        dims = self.dims or (head_dim // len(self.fields),) * len(self.fields)
        if len(dims) != len(self.fields) or sum(dims) > head_dim or sum(dims) < head_dim * (not self.dims):
            raise UserError(
                f"{self} turns {' + '.join(map(str, dims))} dims by {len(self.fields)} fields, and heads have "
                f"{head_dim}: give dims, one number for each field, {head_dim} together or less."
            )
        return per_axis(*(frequencies(dim, self.theta, self.scaling) for dim in dims))


@dataclass(frozen=True)
class XPos(Position):
    """`xpos`, for positions within `span`."""

    span: tuple[int, int]
    theta: float = 10_000.0
    base: float = 512.0
    gamma: float = 0.4

    def check(self, head_dim):
        check_span(self.span, jnp.float32, self.base, self.gamma)
        jax.eval_shape(lambda: frequencies(head_dim, self.theta))

    def queries(self, q_BTHD, tokens):
        return self._scaled(q_BTHD, tokens, "query")

    def keys(self, k_BTHD, tokens):
        return self._scaled(k_BTHD, tokens, "key")

    def _scaled(self, x_BTHD, tokens, role):
        frequency = frequencies(x_BTHD.shape[-1], self.theta)
        return xpos(x_BTHD, tokens.position, role, self.span, frequency, self.base, self.gamma)


_NAMES = {cls.__name__: cls for cls in (NoPE, Rope, XPos, Linear, NTK, YaRN)}
_EXAMPLE = "Rope(theta=500000.0, scaling=Linear(factor=4.0))"


def parse(text: str) -> Position:
    """Reads a position such as "Rope(theta=500000.0, scaling=YaRN(8.0, 4096))" or "NoPE()"; the inverse of `str`.

    Raises:
      UserError: text that is no position, or a name that is not known (with the nearest one).
    """
    try:
        position = _build(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        why = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(f"The position {text!r} cannot be read ({why}); write one such as {_EXAMPLE!r}.") from error
    if not isinstance(position, Position):
        raise UserError(f"The position {text!r} is none by itself; write one such as {_EXAMPLE!r}.")
    return position


def _build(node: ast.expr):
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    name = ast.unparse(node.func)
    if name not in _NAMES:
        near = difflib.get_close_matches(name, _NAMES, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"there is no {name}{guess}, there are {', '.join(_NAMES)}")
    return _NAMES[name](*map(_build, node.args), **{k.arg: _build(k.value) for k in node.keywords})


def check_span(span: tuple[int, int], dtype, base: float, gamma: float) -> None:
    """Raises UserError where the scales of `xpos` overflow."""
    if len(span) != 2 or span[0] > span[1]:
        raise UserError(f"xPos got the span {span}; it is the least and the greatest position, such as (0, 4095).")
    limit, doubling = jnp.finfo(dtype).maxexp // 2 - 4, base / math.log2(1 + 1 / gamma)
    exponent = (span[1] - span[0]) / 2 / doubling
    if exponent > limit:
        raise UserError(
            f"xPos over the span {span} scales by up to 2^{exponent:.0f}, and {jnp.dtype(dtype)} has room for "
            f"2^{limit}: use a span of at most {int(2 * limit * doubling)} positions, or a base of at least "
            f"{math.ceil(base * exponent / limit)}."
        )


def _check_inside(position, span: tuple[int, int]) -> None:
    """Raises UserError where positions that are known lie outside the span."""
    if isinstance(position, jax.core.Tracer):
        return
    least, greatest = np.min(position), np.max(position)
    if least < span[0] or greatest > span[1]:
        raise UserError(f"xPos got positions {least} to {greatest}, outside of its span {span}: give this one.")


def _field(tokens: Tokens, name: str) -> jax.Array:
    if name not in tokens.names:
        raise UserError(
            f"Positions are read from the field {name!r}, but the Tokens have {', '.join(map(repr, tokens.names))}: "
            f"add it with tokens.replace({name}=...)."
        )
    return tokens[name]


def _angles(x_BTHD, position, frequency) -> jax.Array:
    """float32 (batch, length, heads or 1, F)."""
    given = f"{x_BTHD.shape}, positions {position.shape} and frequencies {frequency.shape}"
    if position.ndim == 2:
        position, frequency = position[..., None], frequency[None]
    if frequency.ndim == 2:
        frequency = frequency[:, None]
    (*shape, heads, _), sizes = x_BTHD.shape, (*position.shape, *frequency.shape)
    if len(sizes) != 6 or sizes not in [(*shape, sizes[3], sizes[3], n, sizes[5]) for n in (1, heads)]:
        raise UserError(
            f"Arrays {given} do not fit: they are (batch, length, heads, head_dim), (batch, length) and (F,) or "
            "(heads, F); with several axes (batch, length, axes) and (axes, F) or (axes, heads, F)."
        )
    first, *rest = (
        position[:, :, axis, None, None].astype(jnp.float32) * frequency[axis][None, None]
        for axis in range(position.shape[2])
    )
    return sum(rest, first)


def _turn(x_BTHD, cos_BTHF, sin_BTHF) -> jax.Array:
    """Turns the pairs of the first 2 F dims."""
    pairs, width = cos_BTHF.shape[-1], x_BTHD.shape[-1]
    if 2 * pairs > width:
        raise UserError(f"{pairs} frequencies turn {2 * pairs} dims of {width}: use {width // 2} frequencies or fewer.")
    low, high = x_BTHD[..., :pairs].astype(jnp.float32), x_BTHD[..., pairs : 2 * pairs].astype(jnp.float32)
    turned = [low * cos_BTHF - high * sin_BTHF, high * cos_BTHF + low * sin_BTHF]
    return jnp.concatenate([*(x.astype(x_BTHD.dtype) for x in turned), x_BTHD[..., 2 * pairs :]], axis=-1)
