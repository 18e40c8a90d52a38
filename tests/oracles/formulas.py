"""Random masks, each beside its meaning in plain numpy, and random Tokens to read them on."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from striate.lib import masks
from striate.lib.tokens import Tokens

FIELDS = ("position", "document", "prefix", "frame", "kind", "node")


class Formula(NamedTuple):
    """A mask as the library builds it, simplified, and the same formula evaluated as it was written."""

    mask: masks.Mask
    visible: Callable[[Mapping, Mapping], np.ndarray]  # from fields (..., T, 1) and (..., 1, S); broadcasts


def conjunction(a: Formula, b: Formula) -> Formula:
    return Formula(a.mask & b.mask, lambda q, k: a.visible(q, k) & b.visible(q, k))


def disjunction(a: Formula, b: Formula) -> Formula:
    return Formula(a.mask | b.mask, lambda q, k: a.visible(q, k) | b.visible(q, k))


def negation(a: Formula) -> Formula:
    return Formula(~a.mask, lambda q, k: ~a.visible(q, k))


def causal() -> Formula:
    return Formula(masks.causal(), lambda q, k: q["position"] >= k["position"])


def same(name: str) -> Formula:
    return Formula(masks.same(name), lambda q, k: q[name] == k[name])


def after(name: str) -> Formula:
    return Formula(masks.after(name), lambda q, k: q[name] > k[name])


def window(left: int, right: int, name: str) -> Formula:
    return Formula(masks.window(left, right, name), lambda q, k: _within(q[name] - k[name], -right, left))


def sink(n: int) -> Formula:
    return Formula(masks.sink(n), lambda q, k: (q["position"] >= k["position"]) & (k["position"] < n))


def prefix() -> Formula:
    return Formula(masks.prefix(), lambda q, k: k["prefix"] == 1)


def query(name: str, low: int | None, high: int | None) -> Formula:
    return Formula(masks.query(name, low, high), lambda q, k: _within(q[name], low, high))


def key(name: str, low: int | None, high: int | None) -> Formula:
    return Formula(masks.key(name, low, high), lambda q, k: _within(k[name], low, high))


def difference(query_field: str, key_field: str, low: int | None, high: int | None) -> Formula:
    mask = masks.difference(query_field, key_field, low, high)
    return Formula(mask, lambda q, k: _within(q[query_field] - k[key_field], low, high))


def table(query_field: str | None, key_field: str | None, matrix: np.ndarray) -> Formula:
    def visible(q, k):
        a, b = np.broadcast_arrays(_value(q, query_field), _value(k, key_field))
        seen = np.zeros(a.shape, bool)
        for row, column in np.argwhere(matrix):
            seen |= (a == row) & (b == column)
        return seen

    return Formula(masks.table(query_field, key_field, matrix.tolist()), visible)


def modulo(query_field: str | None, key_field: str | None, divisor: int, remainder: int) -> Formula:
    def visible(q, k):
        return np.fmod(_value(q, query_field) - _value(k, key_field) - remainder, divisor) == 0

    return Formula(masks.modulo(query_field, key_field, divisor, remainder), visible)


def switch(values: bool | np.ndarray) -> Formula:
    """One for each head makes the heads a first axis of what is visible."""
    if isinstance(values, bool):
        return Formula(masks.switch(values), lambda q, k: np.bool_(values))
    return Formula(masks.switch(values.tolist()), lambda q, k: values[:, None, None, None])


def constant(value: bool) -> Formula:
    mask = masks.everything() if value else masks.nothing()
    return Formula(mask, lambda q, k: np.bool_(value))


def _value(fields: Mapping, name: str | None) -> np.ndarray:
    return np.zeros((1, 1, 1), int) if name is None else fields[name]


def _within(x: np.ndarray, low: int | None, high: int | None) -> np.ndarray:
    above = np.ones_like(x, bool) if low is None else x >= low
    below = np.ones_like(x, bool) if high is None else x <= high
    return above & below


def random_formula(rng: np.random.Generator, depth: int = 3, heads: int | None = None) -> Formula:
    """A formula with `depth` operators on its longest path; its switches have a value for each of the heads, if any."""
    if depth == 0:
        return _random_atom(rng, heads)
    first = random_formula(rng, depth - 1, heads)
    match rng.choice(["and", "and", "or", "or", "not"]):
        case "and":
            return conjunction(first, random_formula(rng, rng.integers(depth), heads))
        case "or":
            return disjunction(random_formula(rng, rng.integers(depth), heads), first)
        case _:
            return negation(first)


def _random_atom(rng: np.random.Generator, heads: int | None) -> Formula:
    name, other = (str(rng.choice(FIELDS, p=[0.3, 0.15, 0.1, 0.15, 0.15, 0.15])) for _ in range(2))
    low, high = (None if rng.random() < 0.3 else int(rng.choice([-20, -4, -1, 0, 1, 2, 4, 20])) for _ in range(2))
    left, right = (int(n) for n in rng.integers(0, 30, size=2))
    usual = (
        causal,
        lambda: same("document"),
        lambda: same(name),
        lambda: after(name),
        lambda: window(left, right, name),
        lambda: sink(left),
        prefix,
        lambda: query(name, low, high),
        lambda: key(name, low, high),
        lambda: difference(name, other, low, high),
        lambda: constant(left < 15),
    )
    pair = tuple(rng.permutation([name, None])) if rng.random() < 0.2 else (name, other)
    rarer = (
        lambda: table(*pair, rng.random(rng.choice([1, 2, 5, 32], size=2)) < rng.choice([0.2, 0.5, 0.9])),
        lambda: modulo(*pair, int(rng.choice([1, 2, 3, 4, 7, 31, 32, 33, 50])), left - right),
        lambda: switch(rng.random(heads) < 0.5 if heads else left < 15),
    )
    atoms = usual if rng.random() < 0.6 else rarer
    return atoms[rng.integers(len(atoms))]()


def random_tokens(rng: np.random.Generator, batch: int, length: int) -> Tokens:
    """Ragged documents with numbers in any order, padding, prefixes, runs of a few kinds, nodes that a table of 32 does
    not hold all of; in some rows positions repeat or are shuffled."""
    rows = [_random_row(rng, length) for _ in range(batch)]
    return Tokens(**{name: np.stack([row[name] for row in rows]) for name in FIELDS})


def _random_row(rng: np.random.Generator, length: int) -> dict[str, np.ndarray]:
    cuts = np.sort(rng.integers(0, length + 1, size=rng.integers(1, 5)))
    lengths = np.diff(cuts, prepend=0, append=length)
    numbers = rng.permutation(len(lengths)) - rng.integers(2)  # with one document of padding, -1, or with none
    document = np.repeat(numbers, lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    prefixes = np.repeat(rng.integers(0, 9, size=len(lengths)), lengths)
    order = rng.choice(["natural", "duplicated", "shuffled"], p=[0.6, 0.2, 0.2])
    if order == "duplicated":
        position = position // 3
    if order == "shuffled":
        position = rng.permutation(position)
    kind = np.repeat(rng.integers(-1, 6, size=length // 5 + 1), 5)[:length]
    node = rng.integers(-1, 34) + rng.integers(2, size=length) * rng.integers(9)
    fields = {"position": position, "document": document, "prefix": position < prefixes, "frame": position // 7}
    fields |= {"kind": kind, "node": node}
    return {name: value.astype(np.int32) for name, value in fields.items()}


def as_columns(q_tokens: Tokens) -> dict[str, np.ndarray]:
    """The fields of the queries as (B, T, 1); padding has document -2 in this role."""
    document = np.where(q_tokens.document == -1, -2, q_tokens.document)
    return {name: x[:, :, None] for name, x in {**q_tokens.fields(), "document": document}.items()}


def as_rows(k_tokens: Tokens) -> dict[str, np.ndarray]:
    """The fields of the keys as (B, 1, S)."""
    return {name: x[:, None, :] for name, x in k_tokens.fields().items()}
