"""Scores of a layer: a config names them by text, and the parameters that are learned belong to the module."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from striate.lib import scores
from striate.lib.errors import UserError
from striate.lib.scores import Score


def _learned(module: nn.Module, name: str, start, *further: int):
    """A float32 parameter per head, which starts at `start` (a number or (heads,)); its heads are cut like the rest."""
    shape = module.heads, *further
    initialise = nn.with_logical_partitioning(
        lambda _, shape, dtype: jnp.broadcast_to(jnp.asarray(start, dtype), shape), ("heads", *(None for _ in further))
    )
    return module.param(name, initialise, shape, jnp.float32)


def _temperature(module, start: float = 1.0) -> Score:
    return scores.temperature(_learned(module, "temperature", start))


def _alibi(module, name: str = "position", learned: bool = False) -> Score:
    slopes = scores.alibi_slopes(module.heads)
    return scores.alibi(_learned(module, "alibi_slopes", slopes) if learned else slopes, name)


def _t5_bias(module, buckets: int = 32, bidirectional: bool = False, max_distance: int = 128) -> Score:
    return scores.t5_bias(_learned(module, "t5_bias", 0.0, buckets), bidirectional, max_distance)


def _power(module, power: float = 1.0, slope: float = 0.0, name: str = "position") -> Score:
    learned = (_learned(module, key, start) for key, start in (("power", power), ("power_slope", slope)))
    return scores.power(*learned, name)


def _sigmoid(module, bias: float) -> Score:
    return scores.sigmoid(_learned(module, "sigmoid_bias", bias))


def _sink_logit(module, start: float = 0.0) -> Score:
    return scores.sink_logit(_learned(module, "sink_logit", start))


_BUILDERS: dict[str, Callable[..., Score]] = {
    "plain": lambda module: scores.plain(),
    "softcap": lambda module, cap: scores.softcap(float(cap)),
    "signed": lambda module: scores.signed(),
    "off_by_one": lambda module: scores.off_by_one(),
    "temperature": _temperature,
    "alibi": _alibi,
    "t5_bias": _t5_bias,
    "power": _power,
    "sigmoid": _sigmoid,
    "sink_logit": _sink_logit,
}


@functools.cache
def parse(text: str) -> Callable[[nn.Module], Score]:
    """Reads a score such as "compose(softcap(50.0), t5_bias(buckets=32), sink_logit())".

    Learned, one value per head: temperature(start), t5_bias(buckets, ...), power(power, slope), sigmoid(bias),
    sink_logit(start) and alibi(learned=True).

    Returns:
      What makes the Score inside a module that has `heads`, with the module's parameters.

    Raises:
      UserError: text that is no score, or a name that is not known (with the nearest one).
    """
    try:
        return _build(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        why = error.msg if isinstance(error, SyntaxError) else error
        example = "compose(softcap(50.0), alibi())"
        raise UserError(f"The score {text!r} cannot be read ({why}); write one such as {example!r}.") from error


def _build(node: ast.expr) -> Callable[[nn.Module], Score]:
    if not isinstance(node, ast.Call):
        raise ValueError(f"{ast.unparse(node)} is no call")
    name = ast.unparse(node.func)
    if name == "compose":
        parts = [_build(argument) for argument in node.args]
        return lambda module: scores.compose(*(part(module) for part in parts))
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, _BUILDERS, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"there is no {name}{guess}, there are {', '.join(_BUILDERS)} and compose")
    positional = [ast.literal_eval(argument) for argument in node.args]
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
    inspect.signature(_BUILDERS[name]).bind(None, *positional, **named)
    return lambda module: _BUILDERS[name](module, *positional, **named)
