"""Scores: what becomes of a logit before and after the softmax. One attention, many scores.

A score is elementwise over the pairs of a query i and a key j. From s_ij = scale q_i . k_j it makes

    t_ij = logit(s_ij; i, j)       w_ij = weight(s_ij; i, j), 1 for most scores

    Z_i  = z0_i + sum_j exp(t_ij)  out_i = sum_j w_ij exp(t_ij) v_j / Z_i       lse_i = log Z_i

over the pairs that the mask shows; the mask is applied to t, after all that the score does. A score writes this forward
function only: mixers differentiate it with jax.vjp on the tile, and no gradient of a score needs more than a tile.

A score is a pytree whose leaves are its parameters, so that they can be learned: scalars, which all heads share, or
arrays whose first axis is the heads. What a score knows of a pair beside s are fields of the Tokens (true positions,
frames, ...), never array indices, hence it is the same in any token order and on any mesh.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

import jax
import jax.numpy as jnp
import numpy as np

from striate.lib.errors import UserError
from striate.lib.tokens import Tokens


class Score:
    """The plain softmax, and the base of all scores. Scores are frozen dataclasses and pytrees (`@score`)."""

    normalised = True
    """Whether weights are divided by their sum; else out = sum w exp(t) v, as in sigmoid attention."""

    @property
    def reads(self) -> frozenset[str]:
        """Fields of the Tokens, of queries and keys alike, that the score reads."""
        return frozenset()

    def tile(self, s, query: Mapping, key: Mapping):
        """(t, w) for logits s of any rank; w is None for 1.

        The fields of `query` and of `key` and the parameters of the score broadcast with s: a parameter per head
        stands in the axes of the heads, and a further axis of it comes last, after the axes of s (see `lookup`).
        """
        return self.logit(s, query, key), None

    def logit(self, s, query: Mapping, key: Mapping):
        """t for scores whose weight is 1."""
        return s

    def prepare(self, q_BTHD, k_BSKD, v_BSKV, scale: float):
        """(q, k, v as the products need them, what is left of the score for the tiles), before anything else."""
        return q_BTHD, k_BSKD, v_BSKV, self

    def finish(self, out_BTHV, lse_BTH):
        """(out, lse) after everything was merged: what is to count once, however many devices there are."""
        return out_BTHV, lse_BTH


def score(cls):
    """A frozen dataclass that is a pytree: fields are parameters, but those made with `static()`."""
    cls = dataclass(frozen=True, eq=False)(cls)
    meta = [f.name for f in fields(cls) if f.metadata.get("static")]
    data = [f.name for f in fields(cls) if f.name not in meta]

    def flatten(score):
        leaves = tuple((jax.tree_util.GetAttrKey(name), getattr(score, name)) for name in data)
        return leaves, tuple(getattr(score, name) for name in meta)

    def unflatten(static, leaves):
        return cls(**dict(zip(meta, static, strict=True)), **dict(zip(data, leaves, strict=True)))

    # Not with register_dataclass: its treedefs of two classes compare equal (jax 0.10 to 0.12), so that jit runs the
    # program of one score for another when their hashes fall together.
    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


static = functools.partial(field, metadata={"static": True})


@score
class Plain(Score):
    """t = s."""


@score
class Softcap(Score):
    cap: jax.Array

    def logit(self, s, query, key):
        return self.cap * jnp.tanh(s / self.cap)


@score
class Temperature(Score):
    factor: jax.Array

    def logit(self, s, query, key):
        return self.factor * s


class OfDistance(Score):
    """Of how far back the key is, by the field `name`."""

    name: str

    @property
    def reads(self):
        return frozenset({self.name})

    def back(self, query: Mapping, key: Mapping):
        return query[self.name] - key[self.name]


@score
class Power(OfDistance):
    power: jax.Array
    slope: jax.Array
    name: str = static()

    def logit(self, s, query, key):
        distance = abs(self.back(query, key)).astype(s.dtype)
        return s - self.power * jnp.log1p(distance) - self.slope * distance


@score
class Alibi(OfDistance):
    slope: jax.Array
    name: str = static()

    def logit(self, s, query, key):
        return s - self.slope * abs(self.back(query, key)).astype(s.dtype)


@score
class T5Bias(OfDistance):
    table: jax.Array
    thresholds: tuple[int, ...] = static()
    bidirectional: bool = static()
    name: str = static()

    def logit(self, s, query, key):
        back = self.back(query, key)
        distance = abs(back) if self.bidirectional else jnp.maximum(back, 0)
        bucket = sum((distance >= threshold).astype(jnp.int32) for threshold in self.thresholds)
        if self.bidirectional:
            bucket += jnp.where(back < 0, len(self.thresholds) + 1, 0)
        return s + lookup(self.table, bucket)


@score
class Signed(Score):
    def tile(self, s, query, key):
        return abs(s), jnp.sign(s)


@score
class Sigmoid(Score):
    bias: jax.Array
    normalised = False

    def logit(self, s, query, key):
        return jax.nn.log_sigmoid(s + self.bias)


@score
class SinkLogit(Score):
    sink: jax.Array

    def finish(self, out, lse):
        # A row that sees nothing has lse = -inf, from which logaddexp and the sigmoid have no gradient.
        sink = jnp.broadcast_to(self.sink.reshape(1, 1, -1), lse.shape)
        safe = jnp.where(jnp.isfinite(lse), lse, 0.0)
        kept = jnp.where(jnp.isfinite(lse), jax.nn.sigmoid(safe - sink), 0.0)
        total = jnp.where(jnp.isfinite(lse), jnp.logaddexp(safe, sink), sink)
        return (out * kept[..., None]).astype(out.dtype), total


@score
class LowRankBias(Score):
    query_factor: jax.Array
    key_factor: jax.Array

    def prepare(self, q, k, v, scale):
        for name, x, y in (("query", self.query_factor, q), ("key", self.key_factor, k)):
            batch, length, heads, _ = x.shape
            known = {1, y.shape[2], q.shape[2]}
            if batch not in (1, y.shape[0]) or length != y.shape[1] or heads not in known:
                raise UserError(
                    f"The {name} factor of a low-rank bias has shape {x.shape}, the arrays have {y.shape}: it needs "
                    f"({y.shape[0]} or 1, {y.shape[1]}, one of {sorted(known)} heads, rank)."
                )
        if self.key_factor.shape[2] > k.shape[2]:
            group = q.shape[2] // k.shape[2]
            k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
        return _widen(q, self.query_factor / scale), _widen(k, self.key_factor), v, Plain()


@score
class Custom(Score):
    parameters: tuple
    function: Callable = static()
    names: tuple[str, ...] = static()

    @property
    def reads(self):
        return frozenset(self.names)

    def tile(self, s, query, key):
        result = self.function(s, query, key, *self.parameters)
        return result if isinstance(result, tuple) else (result, None)


@score
class Composed(Score):
    parts: tuple

    @property
    def reads(self):
        return frozenset().union(*(part.reads for part in self.parts))

    @property
    def normalised(self):
        return all(part.normalised for part in self.parts)

    def tile(self, s, query, key):
        weight = None
        for part in self.parts:
            s, factor = part.tile(s, query, key)
            weight = factor if weight is None else weight if factor is None else weight * factor
        return s, weight

    def prepare(self, q, k, v, scale):
        left = []
        for part in self.parts:
            q, k, v, rest = part.prepare(q, k, v, scale)
            left.append(rest)
        return q, k, v, Composed(tuple(left))

    def finish(self, out, lse):
        for part in self.parts:
            out, lse = part.finish(out, lse)
        return out, lse


def plain() -> Score:
    """t = s: the softmax as it is."""
    return Plain()


def softcap(cap) -> Score:
    """t = cap tanh(s / cap), which stays within +-cap; `cap` is a scalar or (heads,). Gemma 2 (2024) has 50."""
    return Softcap(_parameter("cap", cap))


def temperature(factor) -> Score:
    """t = factor s; `factor` is a scalar or (heads,). HeadScale (Wang et al. 2024) learns one for each head."""
    return Temperature(_parameter("factor", factor))


def alibi(slopes, name: str = "position") -> Score:
    """t = s - slope |q.name - k.name|; slopes are a scalar or (heads,), such as `alibi_slopes(heads)`.

    Source: Press et al. 2022 (ALiBi), section 3.
    """
    return Alibi(_parameter("slopes", slopes), name)


def alibi_slopes(heads: int) -> np.ndarray:
    """2^(-8 h / heads) for h = 1 .. heads, float32 (heads,); heads that are no power of two as in the released code.

    Those take the slopes of the next lower power of two, then every other slope of the next higher one.
    """
    lower = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8 / lower * np.arange(1, lower + 1))
    between = 2.0 ** (-4 / lower * np.arange(1, 2 * (heads - lower), 2))
    return np.concatenate([slopes, between]).astype(np.float32)


def t5_bias(table_HN, bidirectional: bool = False, max_distance: int = 128, name: str = "position") -> Score:
    """t = s + table[head, bucket(q.name - k.name)].

    The buckets of one direction: half of them for the distances 0, 1, 2, ..., the other half grows as the logarithm
    up to max_distance, and the last one takes all that is farther. With `bidirectional` the second half of the table
    is for keys that come after the query; else those share the bucket of distance 0.

    T5 itself scales no logits: pass scale=1.0 to attention.

    Args:
      table_HN: (heads, buckets).

    Raises:
      UserError: a table that is not (heads, buckets), fewer than 2 buckets for a direction, or a max_distance within
        the exact buckets.

    Source: Raffel et al. 2020 (T5), section 2.1.
    """
    if np.ndim(table_HN) != 2:
        raise UserError(f"The table of t5_bias has shape {np.shape(table_HN)}; it needs (heads, buckets).")
    buckets = np.shape(table_HN)[1] // (2 if bidirectional else 1)
    exact = buckets // 2
    if buckets < 2 or max_distance <= exact or np.shape(table_HN)[1] % (2 if bidirectional else 1):
        raise UserError(
            f"t5_bias cannot have {np.shape(table_HN)[1]} buckets, bidirectional={bidirectional}, and "
            f"max_distance={max_distance}: it needs 2 buckets or more for a direction and a max_distance > {exact}."
        )
    growth = max_distance / exact
    far = [exact * growth ** (step / (buckets - exact)) for step in range(1, buckets - exact)]
    thresholds = *range(1, exact + 1), *(math.ceil(x - 1e-9 * x) for x in far)
    return T5Bias(_parameter("table", table_HN), thresholds, bidirectional, name)


def power(power, slope=0.0, name: str = "position") -> Score:
    """t = s - power log(1 + d) - slope d with d = |q.name - k.name|: a power law, screened as a Yukawa potential is.

    Both are scalars or (heads,). power = 0 is ALiBi. Where s = 0, weights are as (1 + d)^-power e^(-slope d).
    """
    return Power(_parameter("power", power), _parameter("slope", slope), name)


def signed() -> Score:
    """t = |s|, w = sign(s): weights of either sign, whose magnitudes add up to 1.

    A bias belongs after it: compose(signed(), alibi(...)).

    Source: Lv et al. 2024 (Cog Attention), section 3.
    """
    return Signed()


def sigmoid(bias) -> Score:
    """out = sum_j sigmoid(s + bias) v_j, not normalised; lse is the logarithm of the sum of the sigmoids.

    `bias` is a scalar or (heads,); -log(key length) keeps the sum near that of a softmax at the start.

    Source: Ramapuram et al. 2024 (Sigmoid Attention), section 3.
    """
    return Sigmoid(_parameter("bias", bias))


def sink_logit(sink) -> Score:
    """One more key, of logit `sink` and value 0: Z = exp(sink) + sum_j exp(t_j). A scalar or (heads,).

    It is applied once, after everything was merged: out sigmoid(lse - sink), logaddexp(lse, sink).

    Source: Agarwal et al. 2025 (gpt-oss), section 2.2.
    """
    return SinkLogit(_parameter("sink", sink))


def off_by_one() -> Score:
    """Z = 1 + sum_j exp(t_j), `sink_logit(0)`: a head may attend to nothing (Miller 2023)."""
    return sink_logit(0.0)


def low_rank_bias(query_factor_BTHR, key_factor_BSHR) -> Score:
    """t = s + a_i . b_j, by R more columns of q and k: no array of the size of the bias exists.

    Factors lie in the order of the tokens: a layout permutes them along. In low precision, numbers as large as
    positions lose what matters: use float32, or `alibi`.

    Args:
      query_factor_BTHR: a, (batch or 1, length, heads or 1, rank).
      key_factor_BSHR: b, (batch or 1, key length, key/value heads or heads or 1, rank). With as many as `heads`, keys
        and values are repeated.

    Source: Wu et al. 2025 (FlashBias), section 3.
    """
    for name, x in (("query", query_factor_BTHR), ("key", key_factor_BSHR)):
        if np.ndim(x) != 4 or np.shape(x)[3] != np.shape(query_factor_BTHR)[-1]:
            raise UserError(
                f"The factors of low_rank_bias have shapes {np.shape(query_factor_BTHR)} and "
                f"{np.shape(key_factor_BSHR)}; the {name} factor needs 4 axes, the last of them the rank of both."
            )
    return LowRankBias(jnp.asarray(query_factor_BTHR), jnp.asarray(key_factor_BSHR))


def custom(function: Callable, *parameters, fields: tuple[str, ...] = ("position",)) -> Score:
    """A score of your own: t = function(s, query, key, *parameters), or a pair (t, w).

    Args:
      function: elementwise, of jax.numpy. `query` and `key` map the names of `fields` to int32 arrays; they and the
        parameters broadcast with s. It sees every pair of a tile that has work, hidden ones too, and has to be finite
        and differentiable there.
      parameters: float scalars, or arrays whose first axis is the heads; one of two axes is read with `lookup`.
      fields: what is read of the Tokens.
    """
    named = [_parameter(f"parameter {number}", x) for number, x in enumerate(parameters)]
    return Custom(tuple(named), function, tuple(fields))


def compose(*scores: Score) -> Score:
    """One score after another: each takes the t of the one before; weights multiply.

    The usual order is temperature, softcap, bias. A low-rank bias is part of the products, hence comes first.

    Raises:
      UserError: a low-rank bias after a score that changes the logit, or sigmoid() before one that does.
    """
    for before, after in itertools.pairwise(scores):
        if isinstance(after, LowRankBias) and not isinstance(before, LowRankBias):
            raise UserError(
                f"compose got low_rank_bias after {type(before).__name__.lower()}, and it is added to the products "
                "themselves: put it first, or write the bias with scores.custom."
            )
        if not before.normalised:
            raise UserError(f"compose got {type(after).__name__.lower()} after sigmoid, which comes last: change them.")
    return scores[0] if len(scores) == 1 else Composed(tuple(scores))


def split(score: Score) -> tuple[Score, Score]:
    """(what a score does to each pair, what it does once at the end): for callers that merge partial results."""
    parts = score.parts if isinstance(score, Composed) else (score,)
    at_the_end = tuple(part for part in parts if isinstance(part, SinkLogit))
    return Composed(tuple(part for part in parts if not isinstance(part, SinkLogit))), Composed(at_the_end)


def lookup(table, index):
    """table[..., index], for a parameter (heads, n) of a score and integers that broadcast with its logits.

    The sum over n of where(index == n, table[..., n], 0): neither it nor its gradient gathers or scatters. An index
    outside 0 .. n - 1 gives 0.
    """
    return sum(jnp.where(index == n, table[..., n], 0.0) for n in range(table.shape[-1]))


def alibi_factors(slopes, q_position_BT, k_position_BS) -> tuple[jax.Array, jax.Array]:
    """(a, b) of rank 2 for the bias slope (k.position - q.position), float32: ALiBi wherever the mask is causal.

    Exact as long as slope times position is (positions below 2^24).
    """
    slope_11H = jnp.asarray(slopes, jnp.float32).reshape(1, 1, -1)
    q = q_position_BT.astype(jnp.float32)[:, :, None]
    k = k_position_BS.astype(jnp.float32)[:, :, None]
    a_BTH2 = jnp.stack([-slope_11H * q, jnp.broadcast_to(slope_11H, (*q.shape[:2], slope_11H.size))], axis=-1)
    return a_BTH2, jnp.stack([jnp.ones_like(k), k], axis=-1)


def squared_distance_factors(q_point_BTC, k_point_BSC, factor=1.0) -> tuple[jax.Array, jax.Array]:
    """(a, b) of rank C + 2 for the bias -factor |q.point - k.point|^2; `factor` is a scalar or (heads,)."""
    factor_11H1 = jnp.asarray(factor, q_point_BTC.dtype).reshape(1, 1, -1, 1)
    q, k = q_point_BTC[:, :, None], k_point_BSC[:, :, None]

    def square(x):
        return (x * x).sum(-1, keepdims=True)

    a_BTHR = -factor_11H1 * jnp.concatenate([square(q), jnp.ones_like(square(q)), -2 * q], axis=-1)
    return a_BTHR, jnp.concatenate([jnp.ones_like(square(k)), square(k), k], axis=-1)


def svd_factors(bias_HTS, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(a, b, kept) for a bias that is known as a whole: its best approximation of a rank, for all rows of a batch.

    `kept` (heads,) is the share of the sum of the squares that the factors hold.
    """
    u_HTR, size_HR, v_HRS = jnp.linalg.svd(bias_HTS, full_matrices=False)
    root_H1R = jnp.sqrt(size_HR[:, None, :rank])
    a_HTR, b_HSR = u_HTR[:, :, :rank] * root_H1R, v_HRS.swapaxes(1, 2)[:, :, :rank] * root_H1R
    kept_H = (size_HR[:, :rank] ** 2).sum(-1) / (size_HR**2).sum(-1)
    return a_HTR.swapaxes(0, 1)[None], b_HSR.swapaxes(0, 1)[None], kept_H


def check(score: Score, heads: int, tokens: Tokens) -> None:
    """Raises UserError for a parameter that is no scalar and not per head, or a field that the Tokens do not have."""
    for part in score.parts if isinstance(score, Composed) else (score,):
        name = type(part).__name__.lower()
        for missing in sorted(part.reads - set(tokens.names)):
            raise UserError(
                f"The score {name} reads the field {missing!r}, but the Tokens have {', '.join(tokens.names)}: add it "
                f"with tokens.replace({missing}=...)."
            )
        for leaf in () if isinstance(part, LowRankBias) else jax.tree.leaves(part):
            if leaf.ndim and leaf.shape[0] != heads:
                raise UserError(
                    f"A parameter of the score {name} has shape {leaf.shape} and there are {heads} heads: it needs to "
                    f"be a scalar or have {heads} on its first axis."
                )


def _parameter(name: str, value) -> jax.Array:
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        value = value.astype(jnp.float32)
    return value


def _widen(x_BTHD, factor):
    factor = jnp.broadcast_to(factor, (*x_BTHD.shape[:3], factor.shape[-1]))
    return jnp.concatenate([x_BTHD, factor.astype(x_BTHD.dtype)], axis=-1)
