"""Members of the family of linear attention, as what they are: features, decays and passes of `linear_attention`.

| member | is |
|---|---|
| Katharopoulos et al. 2020 | `linear_attention` of elu_plus_one(q), elu_plus_one(k), normalise=True |
| Lightning-2, TransNormer | `linear_attention` of silu(q), silu(k), log_decay=lightning_log_decay(heads) |
| DeltaNet, gated DeltaNet | `linear_attention` of unit(k), rule="delta", with a log_decay a token |
| LightNet | `running_softmax` of silu(q) |
| Latte; causal Efficient Attention | `running_softmax` of softmax(q), over the latents of a head |
| HLA, AHLA, third order | `higher_order` |
| Flowformer, causal | `flow` |
| mesa-optimisation | `least_squares_step` |
| RG-LRU (Griffin, Hawk, TRecViT) | `gated_lru` |

Forms in which every token sees all of its document are in lib/noncausal.py. Everything here is causal, keeps documents
apart, passes padding over, goes on from the states it gave, and takes what `linear_attention` takes: `tokens`, `chunk`,
`implementation`, and `parallel`, so that it runs over a sharded sequence as that does. Where there are several passes,
states are a tuple with one of each.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from striate.lib.convolution import Tail, short_convolution
from striate.lib.errors import UserError
from striate.lib.linear_attention import check_arrays, linear_attention
from striate.lib.recurrence import Inputs, State, divided, like
from striate.lib.scans import LogSumExp
from striate.lib.scores import alibi_slopes
from striate.lib.tokens import PADDING, Tokens

ORDERS = ("second", "asymmetric", "third")


def elu_plus_one(x: jax.Array) -> jax.Array:
    """The positive feature elu(x) + 1 (Katharopoulos et al. 2020, section 3.2.1)."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def unit(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / sqrt(|x|^2 + epsilon) over the last axis, computed in float32: what the delta rule needs of its keys."""
    wide = _wide(x)
    return (wide * jax.lax.rsqrt((wide * wide).sum(-1, keepdims=True) + epsilon)).astype(x.dtype)


def lightning_log_decay(heads: int, layer: int | None = None, layers: int | None = None) -> jax.Array:
    """The fixed log-decays of Lightning Attention, float32 (heads,): minus the slopes of ALiBi.

    In layer 0, 1, ... of `layers` they weaken with depth, by the factor 1 - layer / (layers - 1) + 1e-5.

    Source: Qin et al. 2024 (Lightning Attention-2) and the authors' code.
    """
    depth = 0.0 if layer is None or layers is None else layer / max(layers - 1, 1) - 1e-5
    return -jnp.asarray(alibi_slopes(heads)) * (1 - depth)


def running_softmax(
    q_BTHD: jax.Array,
    f_BTKD: jax.Array,
    v_BTKV: jax.Array,
    *,
    position: Callable | None = None,
    tokens: Tokens | None = None,
    initial_state: tuple[State, State] | None = None,
    return_state: bool = False,
    parallel=None,
    **how,
):
    """Every channel of the keys keeps a softmax over the tokens so far, and queries weigh these channels.

        o_t = sum_d q_td sum_{s <= t} exp(f_sd) v_s / sum_{s <= t} exp(f_sd)

    With m the running maximum of f and z_t = sum_{s <= t} exp(f_s - m_t), both per channel, it is linear attention of
    q / z and exp(f - m), decayed by m_{t-1} - m_t. A decay is 0 but where a maximum is passed, and nothing is a
    difference of great numbers, however long the sequence.

    Args:
      q_BTHD: queries, (batch, length, heads, head_dim): LightNet has silu(q), Latte a softmax over head_dim.
      f_BTKD: logits, (batch, length, key/value heads, head_dim), in the role of keys; -inf hides.
      v_BTKV: values.
      position: called as (x, position (B, T)) with the keys and with the queries, such as `striate.positions.lrpe`;
        where it makes heads wider, every part has the decay of the channel.

    Returns:
      out as `linear_attention`, with return_state also (the State of m and z, the State of the sums).

    Source: Qin et al. 2024 (LightNet); Dolga et al. 2024 (Latte).
    """
    tokens = Tokens.arange(*q_BTHD.shape[:2]) if tokens is None else tokens
    scales, sums = initial_state or (None, None)
    check_arrays(q_BTHD, f_BTKD, v_BTKV, tokens)
    f_BTKD = jnp.where(like(tokens.document != PADDING, f_BTKD), _wide(f_BTKD), -jnp.inf)
    m, z, rise, scales = _running_scale(f_BTKD, tokens.document, scales, parallel)
    batch, length, heads, width = f_BTKD.shape
    q = q_BTHD.reshape(batch, length, heads, -1, width)
    q = (q / jnp.where(z == 0, 1.0, z)[:, :, :, None]).reshape(q_BTHD.shape)  # of no keys, no sum: it gives 0
    k = jnp.exp(f_BTKD - m)
    if position is not None:
        q, k = position(q, tokens.position), position(k, tokens.position)
        rise = jnp.tile(rise, k.shape[3] // width)
    q, k = q.astype(q_BTHD.dtype), k.astype(q_BTHD.dtype)
    how |= {"tokens": tokens, "initial_state": sums, "parallel": parallel}
    out, sums = linear_attention(q, k, v_BTKV, log_decay=rise, return_state=True, **how)
    return (out, (scales, sums)) if return_state else out


def _running_scale(f, document, state, parallel):
    """m, z and what m rises by, negative, each (B, T, K, D); and the State of them."""
    # Of the keys only their shape is read: a state has two rows.
    k = jnp.zeros((*f.shape[:3], 2), f.dtype)
    inputs = Inputs(k[..., None, :1], k, f, None, None, document)
    recurrence, state = LogSumExp("sum", False), State.empty(k, f) if state is None else state
    out, state = parallel.recur(recurrence, inputs, state) if parallel else recurrence.run(inputs, state)
    m, z, rise = (out[:, :, :, row] for row in range(3))
    # Their derivatives are 0, and are not to be computed.
    return jax.lax.stop_gradient(m), z, jax.lax.stop_gradient(rise), state


class _Passes:
    """`linear_attention` again and again over the same tokens: every pass goes on from its own state."""

    def __init__(self, initial_state: tuple[State, ...] | None, how: dict):
        self.before, self.after, self.how = initial_state, (), how

    def __call__(self, q, k, v, **more):
        before = None if self.before is None else self.before[len(self.after)]
        out, state = linear_attention(q, k, v, initial_state=before, return_state=True, **self.how, **more)
        self.after += (state,)
        return out


def higher_order(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKV: jax.Array,
    *,
    order: str = "second",
    log_decay: jax.Array | None = None,
    normalise: bool = False,
    initial_state: tuple[State, State] | None = None,
    return_state: bool = False,
    **how,
):
    """Products of the causal scores, by passes over passes of linear attention, with constant state.

    With W = Q K^T on and below the diagonal, L for what keeps that of a matrix, and a(q, k, v) = linear attention,

        second:      L(W W^T) V      = a(Q, a(Q, K, K), V)
        asymmetric:  W W V           = a(Q, K, a(Q, K, V))
        third:       L(W W^T) W V    = a(Q, a(Q, K, K), a(Q, K, V))

    They grow with the square and the cube of |q| |k|: scale both by head_dim^-1/2, or give them length 1.

    Args:
      order: "second", "asymmetric" or "third".
      log_decay: as in `linear_attention`, for both passes; a token has decayed by all decays since the first of a path.
      normalise: divide by what comes of values of 1.

    Returns:
      out as `linear_attention`, with return_state also the States of the inner and the outer pass.

    Raises:
      UserError: an order that is not known.

    Source: Zhang et al. 2025 (Higher-order Linear Attention); decays here are those of the passes.
    """
    if order not in ORDERS:
        raise UserError(f"order {order!r} is not known; there are {', '.join(map(repr, ORDERS))}.")
    check_arrays(q_BTHD, k_BTKD, v_BTKV, how.get("tokens"))
    group, width, dtype = q_BTHD.shape[2] // k_BTKD.shape[2], k_BTKD.shape[3], v_BTKV.dtype
    q, k, v = (_wide(x) for x in (q_BTHD, k_BTKD, v_BTKV))
    if normalise:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=3)
    passes = _Passes(initial_state, how)
    if order == "asymmetric":
        keys, values = _per_query_head(k, group), passes(q, k, v, log_decay=log_decay)
    else:
        inner = k if order == "second" else jnp.concatenate([k, v], axis=3)
        keys, values = jnp.split(passes(q, k, inner, log_decay=log_decay), [width], axis=3)
        values = _per_query_head(v, group) if order == "second" else values
    if log_decay is not None:
        log_decay = log_decay.repeat(group, axis=min(log_decay.ndim - 1, 2))
    out = passes(q, keys, values, log_decay=log_decay)
    out = (divided(out[..., :-1], out[..., -1]) if normalise else out).astype(dtype)
    return (out, passes.after) if return_state else out


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _per_query_head(x_BTKD, group: int):
    return x_BTKD.repeat(group, axis=2)


def flow(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKV: jax.Array,
    *,
    feature: Callable = jax.nn.sigmoid,
    initial_state: tuple[State, ...] | None = None,
    return_state: bool = False,
    **how,
):
    """Causal Flow-Attention: `conserved` over the tokens so far. What a source has got it keeps.

    Args are those of `linear_attention`; `feature` makes queries and keys positive.

    Returns:
      out as `linear_attention`, with return_state also the States of its four passes.

    Source: Wu et al. 2022 (Flowformer) and, for the causal form, the authors' code.
    """
    passes = _Passes(initial_state, how)
    out = conserved(q_BTHD, k_BTKD, v_BTKV, passes, feature)
    return (out, passes.after) if return_state else out


def conserved(q_BTHD, k_BTKD, v_BTKV, attend: Callable, feature: Callable, epsilon: float = 1e-6) -> jax.Array:
    """Flow-Attention over what `attend(q, k, v)` sums over: n tokens.

    With Q, K the features, I = Q . sum K / n comes in at a query and O = K . sum Q / n goes out of a key. With either
    held to 1, Q . sum (K / O) / n comes in, and K . sum (Q / I) / n goes out, of which the keys get their shares:

        c = n exp(K . sum (Q / I) / n) / sum exp(...)       o = sigmoid(Q . sum (K / O) / n) Q . sum K c v / (n I)
    """
    check_arrays(q_BTHD, k_BTKD, v_BTKV, None)
    dtype, group = v_BTKV.dtype, q_BTHD.shape[2] // k_BTKD.shape[2]
    q, k, v = (_wide(x) for x in (q_BTHD, k_BTKD, v_BTKV))
    q, k, v = feature(q), _per_query_head(feature(k), group), _per_query_head(v, group)
    one = jnp.ones_like(q[..., :1])

    def total(*parts):
        sums = attend(one, one, jnp.concatenate(parts, axis=3))
        return jnp.split(sums, [sum(x.shape[3] for x in parts[:i]) for i in range(1, len(parts))], axis=3)

    def met(x, sums):
        return ((x + epsilon) * (sums + epsilon)).sum(-1, keepdims=True) / n

    n, of_keys, of_queries = total(one, k, q)
    real = n > 0  # padding reads sums of 0
    n, of_keys, of_queries = (jnp.where(real, x, 1.0) for x in (n, of_keys, of_queries))
    incoming, outgoing = met(q, of_keys), met(k, of_queries)
    of_keys, of_queries = total(k / outgoing, q / incoming)
    strength = jnp.exp(jnp.clip(met(k, of_queries), -1.0, 1.0))
    (of_strengths,) = total(strength)
    share = n * strength / jnp.where(real, of_strengths, 1.0)
    return (jax.nn.sigmoid(met(q, of_keys)) * attend(q / (n * incoming), k, share * v)).astype(dtype)


def least_squares_step(
    x_BTHD: jax.Array,
    *,
    tokens: Tokens | None = None,
    initial_state: tuple[Tail, State, State] | None = None,
    return_state: bool = False,
    parallel=None,
    **how,
):
    """What one step of gradient descent predicts that comes next, in systems x_{t+1} = W x_t, one a head, W unknown.

        y_t = sum_{i <= t} x_i x_{i-1}^H x_t / (t - 1), over the tokens of a document

    It is linear attention of queries x_t, keys x_{t-1} and values x_t over the count of the keys: the step of size 1
    from W = 0 on the mean of |x_i - W x_{i-1}|^2 / 2. Complex numbers go as pairs of real ones: with a key k the query
    x gives the real part of k^H x, and -i x, beside it, the imaginary part. A first token gives 0.

    Args:
      x_BTHD: states, (batch, length, systems, width), real or complex.
      how: chunk, implementation of `linear_attention`.

    Returns:
      y, as x, with return_state also (the Tail, the States of the count and of the sums).

    Source: Zheng et al. 2024 (On mesa-optimization in autoregressively trained transformers), section 4.
    """
    tokens = Tokens.arange(*x_BTHD.shape[:2]) if tokens is None else tokens
    tail, *states = initial_state or (None,)
    is_complex, width = jnp.iscomplexobj(x_BTHD), x_BTHD.shape[3]
    x = jnp.concatenate([x_BTHD.real, x_BTHD.imag], axis=3) if is_complex else x_BTHD
    one = jnp.ones_like(x[:, :, :1, :1])
    flat = jnp.concatenate([one[..., 0], x.reshape(*x.shape[:2], -1)], axis=2)
    taps = jnp.stack([jnp.zeros_like(flat[0, 0]), jnp.ones_like(flat[0, 0])])
    crossing = {"tokens": tokens, "parallel": parallel}
    previous, tail = short_convolution(flat, taps, initial_tail=tail, return_tail=True, **crossing)
    passes = _Passes(tuple(states) or None, how | crossing)
    count = passes(one, one, previous[..., :1, None])
    keys = previous[..., 1:].reshape(x.shape)
    if is_complex:
        turned = jnp.concatenate([x_BTHD.imag, -x_BTHD.real], axis=3)
        out = passes(jnp.stack([x, turned], axis=3).reshape(*x.shape[:2], -1, 2 * width), keys, x)
        (real, of_imag), (imag, of_real) = (jnp.split(out[:, :, part::2], 2, axis=3) for part in (0, 1))
        out = real - of_real + 1j * (of_imag + imag)
    else:
        out = passes(x, keys, x)
    out = (out / jnp.maximum(count, 1)).astype(x_BTHD.dtype)
    return (out, (tail, *passes.after)) if return_state else out


def gated_lru(
    u_BTW: jax.Array,
    input_gate_BTW: jax.Array,
    recurrence_gate_BTW: jax.Array,
    rate_W: jax.Array,
    *,
    initial_state: tuple[State, State] | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    **how,
):
    """The real-gated linear recurrent unit: in every channel, with r and i the gates,

        log a = -rate r        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t,  where a document begins h = i u

    Args:
      u_BTW: inputs, (batch, length, width).
      input_gate_BTW, recurrence_gate_BTW: i and r, 0 to 1.
      rate_W: at least 0, (width,): 8 softplus of a parameter in the paper, so that a is between its 8th power and 1.
      implementation: of `linear_attention`, whose heads are the channels; None is "scan".

    Returns:
      h (batch, length, width) in the dtype of u, with return_state also the States of the count of tokens and of h.

    Source: De et al. 2024 (Griffin), section 2.4; at the beginning of a document, the authors' code.
    """
    if not u_BTW.shape == input_gate_BTW.shape == recurrence_gate_BTW.shape or rate_W.shape != u_BTW.shape[2:]:
        raise UserError(
            f"u {u_BTW.shape}, gates {input_gate_BTW.shape} and {recurrence_gate_BTW.shape} and rate {rate_W.shape} do "
            "not fit: the first three need one shape (batch, length, width), and rate (width,)."
        )
    wide = jnp.promote_types(u_BTW.dtype, jnp.float32)
    passes = _Passes(initial_state, how | {"implementation": implementation or "scan"})
    one = jnp.ones((*u_BTW.shape[:2], 1, 1), wide)
    begins_BT1 = passes(one, one, one)[..., 0] == 1
    log_a = -rate_W.astype(wide)[None, None] * recurrence_gate_BTW.astype(wide)
    factor = jnp.where(begins_BT1, 1.0, _square_root(-jnp.expm1(2 * log_a)))
    x = (factor * input_gate_BTW * u_BTW)[..., None]
    h = passes(jnp.ones_like(x), jnp.ones_like(x), x, log_decay=log_a)[..., 0].astype(u_BTW.dtype)
    return (h, passes.after) if return_state else h


@jax.custom_jvp
def _square_root(x):
    """With a derivative of at most 1000, so that a decay of nearly 1 does not overturn a step."""
    return jnp.sqrt(x)


@_square_root.defjvp
def _(primals, tangents):
    return jnp.sqrt(primals[0]), tangents[0] * 0.5 / jnp.sqrt(jnp.maximum(primals[0], 2.5e-7))
