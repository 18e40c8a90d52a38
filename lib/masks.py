"""One mask algebra: who sees whom, as a formula over the Tokens of a query and of a key.

A formula is built from atoms and is closed under `&`, `|` and `~`. It has three readings:

  dense    the (batch, T, S) array of booleans: the oracle, and what small problems print
  tile     the same booleans for one tile, from the query column and the key row of each field it reads
  verdict  for a whole block, from summaries of each field: NONE (no pair is visible), ALL, or MIXED. Kleene logic: a
           verdict of NONE or ALL is always right, MIXED may be pessimistic

The meaning depends on the Tokens alone, hence for any orders P of the queries and R of the keys
mask(q[P], k[R]) == mask(q, k)[P][:, R]: a permuted layout needs no new masks.

Formulas are immutable, compare and hash by structure (so they can be static arguments of jit), and print as text that
`parse` reads back.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np

from striate.lib.errors import UserError
from striate.lib.tokens import Tokens

NONE, MIXED, ALL = -1, 0, 1

Read = tuple
"""A summary of a field over a block: (reduction, field), the reduction being "least" or "greatest"."""


class Mask:
    """A formula over (query token, key token). Combine with `&`, `|`, `~`."""

    def __and__(self, other: Mask) -> Mask:
        return _conjunction(self, other)

    def __or__(self, other: Mask) -> Mask:
        return ~(~self & ~other)

    def __invert__(self) -> Mask:
        return Not(self)

    @property
    def query_reads(self) -> frozenset[Read]:
        """The summaries of query blocks that a verdict needs."""
        raise NotImplementedError

    @property
    def key_reads(self) -> frozenset[Read]:
        """The summaries of key blocks that a verdict needs."""
        raise NotImplementedError

    @property
    def query_fields(self) -> frozenset[str]:
        """The fields of the query tokens that the formula reads."""
        return frozenset(field for _, field, *_ in self.query_reads)

    @property
    def key_fields(self) -> frozenset[str]:
        """The fields of the key tokens that the formula reads."""
        return frozenset(field for _, field, *_ in self.key_reads)

    @property
    def fields(self) -> frozenset[str]:
        return self.query_fields | self.key_fields

    @property
    def heads(self) -> int | None:
        """The number of heads that the formula tells apart; None where it is the same for all."""
        return None

    def head(self, index: int) -> Mask:
        """The formula of one head."""
        return self

    def for_heads(self, heads: int) -> tuple[Mask, ...]:
        """The formulas of all heads.

        Raises:
          UserError: the formula tells another number of heads apart.
        """
        if self.heads not in (None, heads):
            raise UserError(f"The mask {self} is for {self.heads} heads, and here are {heads}: make the numbers agree.")
        return tuple(self.head(index) for index in range(heads))

    def tile(self, query: Mapping, key: Mapping):
        """Visibility from fields of `query` as (..., q, 1) and of `key` as (..., 1, k); broadcasts to (..., q, k)."""
        raise NotImplementedError

    def query_summaries(self, blocks: Mapping) -> dict[Read, jax.Array]:
        """What a verdict needs to know of blocks of queries: a pytree of int32 arrays (...).

        Args:
          blocks: fields (..., n) of Tokens as_queries, n tokens to a block; those that the formula reads, or more.
        """
        return {read: _summary(blocks, *read) for read in self.query_reads}

    def key_summaries(self, blocks: Mapping) -> dict[Read, jax.Array]:
        """What a verdict needs to know of blocks of keys: a pytree of int32 arrays (...); `blocks` as for queries."""
        return {read: _summary(blocks, *read) for read in self.key_reads}

    def bounds(self, query: Mapping, key: Mapping):
        """(none, all): booleans for blocks, from their summaries; the leaves of `query` and `key` broadcast."""
        raise NotImplementedError

    def verdict(self, query: Mapping, key: Mapping):
        """NONE, MIXED or ALL (int8) for blocks, from `query_summaries` and `key_summaries`.

        The leaves of the two broadcast: expand them first, as in jax.tree.map(lambda x: x[:, :, None], query). The
        result broadcasts to the blocks: a side that decides nothing adds no axis.
        """
        none, all_ = self.bounds(query, key)
        return (all_ * 1 - none * 1).astype("int8")

    def dense(self, q_tokens: Tokens, k_tokens: Tokens):
        """The whole mask, bool (batch, T, S). For oracles and pictures: no mixer builds it."""
        self.check(q_tokens, k_tokens)
        query = {name: x[:, :, None] for name, x in q_tokens.as_queries().fields().items()}
        key = {name: x[:, None, :] for name, x in k_tokens.fields().items()}
        return jnp.broadcast_to(self.tile(query, key), (*q_tokens.shape, k_tokens.shape[1]))

    def check(self, q_tokens: Tokens, k_tokens: Tokens) -> None:
        """Raises UserError when the formula reads a field that the Tokens do not have."""
        for role, needed, tokens in (("query", self.query_fields, q_tokens), ("key", self.key_fields, k_tokens)):
            for name in sorted(needed - set(tokens.names)):
                raise UserError(
                    f"The mask {self} reads the {role} field {name!r}, but the {role} Tokens have "
                    f"{', '.join(map(repr, tokens.names))}{_nearest(name, tokens.names)}: "
                    f"add it with tokens.replace({name}=...)."
                )


@dataclass(frozen=True, repr=False)
class Difference(Mask):
    """The atom low <= q.a - k.b <= high; a field of None is the constant 0, a bound of None is no bound."""

    query_field: str | None
    key_field: str | None
    low: int | None = None
    high: int | None = None

    @property
    def query_reads(self):
        return _extent(self.query_field)

    @property
    def key_reads(self):
        return _extent(self.key_field)

    def tile(self, query, key):
        difference = _field(query, self.query_field) - _field(key, self.key_field)
        return (difference >= _or(self.low, difference)) & (difference <= _or(self.high, difference))

    def bounds(self, query, key):
        least = _read(query, "least", self.query_field) - _read(key, "greatest", self.key_field)
        greatest = _read(query, "greatest", self.query_field) - _read(key, "least", self.key_field)
        none = (greatest < _or(self.low, greatest)) | (least > _or(self.high, least))
        all_ = (least >= _or(self.low, least)) & (greatest <= _or(self.high, greatest))
        return none, all_

    def __repr__(self):
        query, key, low, high = self.query_field, self.key_field, self.low, self.high
        if query == key and (low, high) == (0, None):
            return "causal()" if query == "position" else f"at_least({query!r})"
        if query == key and (low, high) == (1, None):
            return f"after({query!r})"
        if query == key and (low, high) == (0, 0):
            return f"same({query!r})"
        if query == key and low is not None and high is not None and low <= 0 <= high:
            right = "" if low == 0 else f", right={-low}"
            return f"window({high}{right}{'' if query == 'position' else f', name={query!r}'})"
        if key is None:
            return f"query({query!r}, {low}, {high})"
        if query is None:
            return f"key({key!r}, {_negative(high)}, {_negative(low)})"
        return f"difference({query!r}, {key!r}, {low}, {high})"


@dataclass(frozen=True, repr=False)
class Constant(Mask):
    """Every pair, or no pair."""

    value: bool
    query_reads = key_reads = frozenset()

    def __invert__(self):
        return Constant(not self.value)

    def tile(self, query, key):
        return np.bool_(self.value)

    def bounds(self, query, key):
        return np.bool_(not self.value), np.bool_(self.value)

    def __repr__(self):
        return "everything()" if self.value else "nothing()"


@dataclass(frozen=True, repr=False)
class And(Mask):
    """Visible where every term is. Made by `&`, which fuses terms over the same pair of fields."""

    terms: tuple[Mask, ...]

    @property
    def query_reads(self):
        return frozenset().union(*(term.query_reads for term in self.terms))

    @property
    def key_reads(self):
        return frozenset().union(*(term.key_reads for term in self.terms))

    def tile(self, query, key):
        first, *rest = (term.tile(query, key) for term in self.terms)
        for visible in rest:
            first = first & visible
        return first

    def bounds(self, query, key):
        (none, all_), *rest = (term.bounds(query, key) for term in self.terms)
        for other_none, other_all in rest:
            none, all_ = none | other_none, all_ & other_all
        return none, all_

    def __repr__(self):
        return " & ".join(f"({term!r})" if _is_or(term) else repr(term) for term in self.terms)


@dataclass(frozen=True, repr=False)
class Not(Mask):
    """Visible where the term is not. A disjunction is the negation of a conjunction of negations, and prints as `|`."""

    term: Mask

    def __invert__(self):
        return self.term

    @property
    def query_reads(self):
        return self.term.query_reads

    @property
    def key_reads(self):
        return self.term.key_reads

    def tile(self, query, key):
        return ~self.term.tile(query, key)

    def bounds(self, query, key):
        none, all_ = self.term.bounds(query, key)
        return all_, none

    def __repr__(self):
        if _is_or(self):
            return " | ".join(repr(~term) for term in self.term.terms)
        return f"~{self.term!r}"


def _is_or(mask: Mask) -> bool:
    return isinstance(mask, Not) and isinstance(mask.term, And)


def _conjunction(left: Mask, right: Mask) -> Mask:
    """left & right: flattened, with Differences of the same pair of fields intersected and constants gone."""
    fused: dict[object, Mask] = {}
    for part in (left, right):
        for term in part.terms if isinstance(part, And) else (part,):
            same_pair = (term.query_field, term.key_field) if isinstance(term, Difference) else term
            fused[same_pair] = _intersect(fused[same_pair], term) if same_pair in fused else term
    terms = tuple(term for term in fused.values() if term != Constant(True))
    if Constant(False) in terms:
        return Constant(False)
    return And(terms) if len(terms) > 1 else (terms or (Constant(True),))[0]


def _intersect(left: Mask, right: Mask) -> Mask:
    if not isinstance(left, Difference):
        return left
    low = max((x for x in (left.low, right.low) if x is not None), default=None)
    high = min((x for x in (left.high, right.high) if x is not None), default=None)
    if low is not None and high is not None and low > high:
        return Constant(False)
    return Difference(left.query_field, left.key_field, low, high)


def _summary(blocks: Mapping, reduction: str, field: str):
    return blocks[field].min(-1) if reduction == "least" else blocks[field].max(-1)


def _extent(field: str | None) -> frozenset[Read]:
    return frozenset() if field is None else frozenset({("least", field), ("greatest", field)})


def _read(summaries: Mapping, reduction: str, field: str | None):
    return 0 if field is None else summaries[reduction, field]


def _field(values: Mapping, name: str | None):
    return 0 if name is None else values[name]


def _or(bound, fallback):
    return fallback if bound is None else bound


def _negative(bound: int | None) -> int | None:
    return None if bound is None else -bound


def difference(query_field: str | None, key_field: str | None, low: int | None = None, high: int | None = None) -> Mask:
    """low <= q.query_field - k.key_field <= high; a field of None is the constant 0, a bound of None is no bound.

    Raises:
      UserError: no field at all, a field that is not text, or a bound that is not a whole number.
    """
    fields, bounds = {query_field, key_field} - {None}, {low, high} - {None}
    if not all(isinstance(name, str) for name in fields) or not all(isinstance(x, Integral) for x in bounds):
        raise UserError(
            f"difference({query_field!r}, {key_field!r}, {low!r}, {high!r}) cannot be: fields are names in quotes and "
            "bounds are whole numbers or None."
        )
    if not fields:
        raise UserError("difference(None, None) compares nothing: name a query field or a key field.")
    if low is not None and high is not None and low > high:
        return Constant(False)
    return Constant(True) if low is None and high is None else Difference(query_field, key_field, low, high)


def everything() -> Mask:
    """Every pair is visible."""
    return Constant(True)


def nothing() -> Mask:
    """No pair is visible."""
    return Constant(False)


def causal() -> Mask:
    """The key is not later than the query: q.position >= k.position."""
    return at_least("position")


def at_least(name: str) -> Mask:
    """q >= k in the named field."""
    return difference(name, name, low=0)


def after(name: str) -> Mask:
    """q > k in the named field."""
    return difference(name, name, low=1)


def same(name: str) -> Mask:
    """q == k in the named field; same("document") keeps packed documents apart and hides padding."""
    return difference(name, name, low=0, high=0)


def window(left: int | None, right: int | None = 0, name: str = "position") -> Mask:
    """-right <= q - k <= left: `left` tokens back, the token itself, `right` ahead; None is no limit."""
    return difference(name, name, low=_negative(right), high=left)


def sink(n: int) -> Mask:
    """Causal, and the key is one of the first n positions of its document."""
    return causal() & key("position", None, n - 1)


def prefix(name: str = "prefix") -> Mask:
    """The key belongs to the prefix (its field is 1): `causal() | prefix()` is the prefix-LM mask."""
    return key(name, 1, 1)


def query(name: str, low: int | None = None, high: int | None = None) -> Mask:
    """low <= q.name <= high."""
    return difference(name, None, low, high)


def key(name: str, low: int | None = None, high: int | None = None) -> Mask:
    """low <= k.name <= high."""
    return difference(None, name, _negative(high), _negative(low))


_NAMES = {f.__name__: f for f in (causal, at_least, after, same, window, sink, prefix, query, key, difference)}
_NAMES |= {"everything": everything, "nothing": nothing}


def parse(text: str) -> Mask:
    """Reads a formula such as "causal() & (window(1023) | sink(4)) & same('document')"; the inverse of `str`.

    Raises:
      UserError: text that is no formula, or a name that is not known (with the nearest one).
    """
    try:
        return _build(ast.parse(text.strip(), mode="eval").body, text)
    except (SyntaxError, TypeError) as error:
        why = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(f'The mask {text!r} cannot be read ({why}); write one such as "{_EXAMPLE}".') from error


_EXAMPLE = "causal() & same('document')"


def _build(node: ast.expr, text: str) -> Mask:
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _build(left, text) & _build(right, text)
        case ast.BinOp(left, ast.BitOr(), right):
            return _build(left, text) | _build(right, text)
        case ast.UnaryOp(ast.Invert(), operand):
            return ~_build(operand, text)
        case ast.Call(ast.Name(name), args, keywords):
            if name not in _NAMES:
                raise UserError(
                    f"The mask {text!r} uses {name!r}, which is no mask{_nearest(name, _NAMES)}; "
                    f"there are {', '.join(_NAMES)}."
                )
            literal = [_literal(arg, text) for arg in args]
            return _NAMES[name](*literal, **{k.arg: _literal(k.value, text) for k in keywords})
        case _:
            raise UserError(
                f"The mask {text!r} holds {ast.unparse(node)!r}, which is no formula; "
                f'combine calls with & | ~, as in "{_EXAMPLE}".'
            )


def _literal(node: ast.expr, text: str):
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise UserError(
            f"The mask {text!r} has the argument {ast.unparse(node)}; arguments are numbers and quoted field names."
        ) from error


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
