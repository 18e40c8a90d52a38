"""Problems of the linear recurrence, every rule and decay, and what each of its forms has to satisfy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles.linear import Problem, recurrence
from striate import Tokens
from striate.lib.linear_attention import linear_attention
from striate.lib.recurrence import State

DECAYS = ("none", "head", "token", "channel")
KINDS = [("sum", False, decay) for decay in DECAYS] + [("sum", True, "token"), ("sum", True, "channel")]
KINDS += [("delta", False, decay) for decay in DECAYS]
USUAL = [("sum", False, "none"), ("sum", True, "token"), ("sum", False, "channel"), ("delta", False, "token")]


def kinds(long=(), usual=USUAL) -> list:
    """Parameters of a test: those that are as `usual`, marked long where they are named so; the others are slow."""

    def marks(kind):
        return [pytest.mark.slow] if kind not in usual else [pytest.mark.long] * (kind in long)

    return [pytest.param(kind, id=str(kind), marks=marks(kind)) for kind in KINDS]


def documents(rng, batch: int, length: int) -> np.ndarray:
    """Ragged ones, with padding between and at the ends, and one whose number comes again."""
    document = np.stack([np.sort(rng.integers(0, 5, length)) for _ in range(batch)])
    document[document == 3] = 1
    document[rng.random((batch, length)) < 0.1] = -1
    return document.astype(np.int32)


def problem(
    rule, normalise, decay, seed=0, batch=2, length=75, heads=4, kv_heads=2, width=8, value_width=5, strength=1.0
):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q, k = normal(batch, length, heads, width), normal(batch, length, kv_heads, width)
    if normalise:
        q, k = np.exp(q), np.exp(k)
    if rule == "delta":
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    shapes = {"head": (kv_heads,), "token": (batch, length, kv_heads), "channel": (batch, length, kv_heads, width)}
    g = None if decay == "none" else -strength * np.exp(normal(*shapes[decay]))
    beta = rng.random((batch, length, kv_heads)).astype(np.float32) if rule == "delta" else None
    v = normal(batch, length, kv_heads, value_width)
    return Problem(rule, normalise, q, k, v, g, beta, documents(rng, batch, length))


def attend(given: Problem, **how):
    tokens = Tokens(position=np.zeros_like(given.document), document=given.document)
    fixed = {"rule": given.rule, "normalise": given.normalise, "tokens": tokens, "return_state": True}
    return linear_attention(given.q, given.k, given.v, log_decay=given.log_decay, beta=given.beta, **fixed, **how)


def alike(given: Problem, share: float) -> Problem:
    """Its keys so much the same, of length 1, and written almost in full: powers of their products are 1e20."""
    k = (1 - share) * given.k + share * given.k.shape[-1] ** -0.5
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    return given._replace(k=k, beta=0.9 + 0.1 * given.beta, document=0 * given.document)


def part(given: Problem, start: int, stop: int) -> Problem:
    def cut(x):
        return x if x is None or x.ndim < 2 else x[:, start:stop]

    return Problem(*given[:2], *map(cut, given[2:]))


def names(given: Problem) -> list[str]:
    """Of the arrays that have a gradient."""
    return [name for name in ("q", "k", "v", "log_decay", "beta") if getattr(given, name) is not None]


def first_state(given: Problem) -> State:
    """A random one, of the documents with which the problem begins."""
    rng = np.random.default_rng(8)
    memory = rng.normal(size=(given.k.shape[0], *given.k.shape[2:], given.v.shape[3]))
    document = given.document[np.arange(len(given.document)), (given.document != -1).argmax(1)]
    return State(memory, np.exp(rng.normal(size=memory.shape[:-1])), jnp.asarray(document))


def gradients(given: Problem, dtype, run=attend, before: State | None = None, **how) -> dict[str, np.ndarray]:
    """Of sums of everything that `run` gives, with random weights: by the name of the array, those of `before` too."""
    rng = np.random.default_rng(9)
    d_out = rng.normal(size=(*given.q.shape[:3], given.v.shape[3]))
    d_memory = rng.normal(size=(given.k.shape[0], *given.k.shape[2:], given.v.shape[3]))
    of_state = () if before is None else ("memory", "total") if given.normalise else ("memory",)

    def loss(arrays):
        own = {name: x for name, x in arrays.items() if name not in of_state}
        first = (
            {} if before is None else {"initial_state": before._replace(**{name: arrays[name] for name in of_state})}
        )
        out, state = run(given._replace(**own), **first, **how)
        loss = (out * d_out.astype(dtype)).sum() + (state.memory * d_memory.astype(dtype)).sum()
        return loss + (state.total * d_memory[..., 0].astype(dtype)).sum() if "total" in of_state else loss

    if before is not None:
        before = before._replace(memory=before.memory.astype(dtype), total=before.total.astype(dtype))
    arrays = {name: getattr(given, name).astype(dtype) for name in names(given)}
    arrays |= {name: getattr(before, name) for name in of_state}
    return {name: np.asarray(x) for name, x in jax.jit(jax.grad(loss))(arrays).items()}


def check_gradients(given: Problem, run=attend, before: State | None = None, **how) -> None:
    """Those in float32 against those of the recurrence in float64."""
    with jax.enable_x64(True):
        true = gradients(given, np.float64, before=before, implementation="reference")
    for name, got in gradients(given, np.float32, run, before, **how).items():
        want = true[name]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5 * abs(want).max(), err_msg=name)


def check_values(given: Problem, **how) -> None:
    """Outputs and the last state against those of the oracle."""
    true, states = recurrence(given)
    out, state = attend(given, **how)
    np.testing.assert_allclose(out, true, rtol=1e-5, atol=1e-5 * abs(true).max())
    np.testing.assert_allclose(state.memory, states, rtol=1e-5, atol=1e-5 * abs(states).max())


def check_decays(given: Problem, **how) -> None:
    """Outputs, and that the state and gradients are finite: for decays that are as good as none, or leave nothing.

    The state is not compared: where sums of a chunk are 1e6, their difference over its last tokens is not exact.
    """
    true, _ = recurrence(given)
    out, state = attend(given, **how)
    np.testing.assert_allclose(out, true, rtol=1e-5, atol=1e-5 * abs(true).max())
    assert np.isfinite(state.memory).all()

    def loss(v, log_decay):
        return (attend(given._replace(v=v, log_decay=log_decay), **how)[0] ** 2).sum()

    assert all(np.isfinite(x).all() for x in jax.jit(jax.grad(loss, (0, 1)))(given.v, given.log_decay))


def check_that_a_state_goes_on(given: Problem, cuts: tuple[int, ...], **how) -> None:
    """A sequence cut there, each part from the state that the one before it left, is the whole sequence."""
    (whole, state), parts, at = attend(given, **how), [], None
    for start, stop in itertools.pairwise(cuts):
        out, at = attend(part(given, start, stop), initial_state=at, **how)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)
    for x, y in zip(at, state, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def check_isolation(kind, length: int, **how) -> None:
    """Where all of one document changes, no bit of an output or a gradient of the others does."""
    given, other = problem(*kind, length=length), problem(*kind, length=length, seed=1)
    edited = given.document == 2
    assert edited.any() and not edited.all()
    per_token = [name for name in names(given) if getattr(given, name).ndim > 1]

    @jax.jit
    def results(arrays):
        out, pull = jax.vjp(lambda arrays: attend(given._replace(**arrays), **how)[0], arrays)
        return out, pull(jnp.ones_like(out))[0]

    def mixed(x, y):
        return np.where(edited.reshape(*edited.shape, *(1,) * (x.ndim - 2)), y, x)

    before = results({name: getattr(given, name) for name in per_token})
    after = results({name: mixed(getattr(given, name), getattr(other, name)) for name in per_token})
    for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[~edited], np.asarray(y)[~edited])
        assert (np.asarray(x)[edited] != np.asarray(y)[edited]).any()
