"""Elementwise functions in the words that Mosaic GPU knows: those it lacks are said in others.

A score is any function of jax.numpy, and what jax.vjp makes of it has operations that the compiler of kernels does not
take (jax 0.11 and 0.12). They are replaced in the jaxpr, one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

WORDS: dict[str, Callable] = {
    "add_any": lambda x, y: x + y,
    "expm1": lambda x, **_: lax.exp(x) - 1,
    "integer_pow": lambda x, y: 1 / lax.integer_pow(x, -y) if y < 0 else lax.integer_pow(x, y),
    "log1p": lambda x, **_: lax.log(1 + x),
    "logistic": lambda x, **_: 1 / (1 + lax.exp(-x)),
}


def in_known_words(function: Callable, *arrays):
    """function(*arrays), pytrees of arrays in and out."""
    leaves, tree = jax.tree.flatten(arrays)
    closed, shape = jax.make_jaxpr(lambda *leaves: function(*tree.unflatten(leaves)), return_shape=True)(*leaves)
    return jax.tree.unflatten(jax.tree.structure(shape), _said(closed.jaxpr, closed.consts, leaves))


def _said(jaxpr: Jaxpr, consts, arguments) -> list:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def value(x):
        return x.val if isinstance(x, Literal) else known[x]

    for equation in jaxpr.eqns:
        given, name = [value(x) for x in equation.invars], equation.primitive.name
        inner = next((x for x in equation.params.values() if isinstance(x, ClosedJaxpr)), None)
        if inner:
            results = _said(inner.jaxpr, inner.consts, given)
        elif name in WORDS:
            results = [WORDS[name](*given, **equation.params)]
        else:
            results = equation.primitive.bind(*given, **equation.primitive.get_bind_params(equation.params))
            results = results if equation.primitive.multiple_results else [results]
        known.update(zip(equation.outvars, results, strict=True))
    return [value(x) for x in jaxpr.outvars]
