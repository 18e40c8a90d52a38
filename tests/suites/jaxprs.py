"""What a program does, read from its jaxpr."""

from collections.abc import Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def jaxprs(jaxpr: Jaxpr, times: int = 1) -> Iterator[tuple[Jaxpr, int]]:
    """The jaxpr and all those inside it, each with how often it runs; of a `while`, whose count is not known, once."""
    yield jaxpr, times
    for equation in jaxpr.eqns:
        runs = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr))
        for inner in leaves:
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield from jaxprs(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner, runs)


def equations(jaxpr: Jaxpr, primitive: str) -> Iterator[tuple[JaxprEqn, int]]:
    """Every equation of one primitive, with how often it runs."""
    for inner, times in jaxprs(jaxpr):
        yield from ((equation, times) for equation in inner.eqns if equation.primitive.name == primitive)
