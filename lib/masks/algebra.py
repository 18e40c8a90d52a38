"""The algebra: what every formula can do, and the ways to combine formulas."""

from __future__ import annotations

import difflib
import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from striate.lib.errors import UserError
from striate.lib.masks.summaries import Read, summarise
from striate.lib.tokens import Tokens

NONE, MIXED, ALL = -1, 0, 1


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
    def is_band(self) -> bool:
        """Whether the formula bounds a difference of two fields on both sides, as windows and documents do."""
        return False

    @property
    def heads(self) -> int | None:
        """The number of heads that its switches speak of; None where the formula is the same for every head."""
        return None

    def head(self, index: int) -> Mask:
        """The formula of one head: switches are constants there, and gone.

        Raises:
          UserError: a head that the switches do not speak of.
        """
        if self.heads and not 0 <= index < self.heads:
            raise UserError(f"The mask {self} has no head {index}: it has heads 0 to {self.heads - 1}.")
        return self._head(index)

    def for_heads(self, heads: int) -> tuple[Mask, ...]:
        """The formulas of all heads.

        Raises:
          UserError: the switches speak of another number of heads.
        """
        if self.heads not in (None, heads):
            raise UserError(
                f"The mask {self} has switches for {self.heads} heads, and here are {heads}: "
                f"give every switch {heads} values, or use {self.heads} heads."
            )
        return tuple(self._head(index) for index in range(heads))

    def by_formula(self, heads: int) -> dict[Mask, list[int]]:
        """Each formula that a head has, and which of the heads have it: attention computes those together.

        Raises:
          UserError: the switches speak of another number of heads.
        """
        members: dict[Mask, list[int]] = {}
        for head, formula in enumerate(self.for_heads(heads)):
            members.setdefault(formula, []).append(head)
        return members

    def tile(self, query: Mapping, key: Mapping):
        """Visibility from fields of `query` as (..., q, 1) and of `key` as (..., 1, k); broadcasts to (..., q, k).

        Raises:
          UserError: a formula with switches per head; read `head(h)` instead.
        """
        raise NotImplementedError

    def select(self, query: Mapping, key: Mapping, shown, hidden):
        """where(tile(query, key), shown, hidden), by one choice for every comparison.

        Kernels want it so: booleans of a whole tile, kept until they are combined, are more than their registers hold.
        """
        return jnp.where(self.tile(query, key), shown, hidden)

    def query_summaries(self, blocks: Mapping) -> dict[Read, jax.Array]:
        """What a verdict needs to know of blocks of queries: a pytree of integer arrays (...).

        Args:
          blocks: fields (..., n) of Tokens as_queries, n tokens to a block; those that the formula reads, or more.
        """
        return summarise(blocks, self.query_reads)

    def key_summaries(self, blocks: Mapping) -> dict[Read, jax.Array]:
        """What a verdict needs to know of blocks of keys: a pytree of integer arrays (...); `blocks` as for queries."""
        return summarise(blocks, self.key_reads)

    def bounds(self, query: Mapping, key: Mapping):
        """(none, all): booleans for blocks, from their summaries; the leaves of `query` and `key` broadcast.

        Raises:
          UserError: a formula with switches per head; read `head(h)` instead.
        """
        raise NotImplementedError

    def verdict(self, query: Mapping, key: Mapping):
        """NONE, MIXED or ALL (int8) for blocks, from `query_summaries` and `key_summaries`.

        The leaves of the two broadcast: expand them first, as in jax.tree.map(lambda x: x[:, :, None], query). The
        result broadcasts to the blocks: a side that decides nothing adds no axis.

        Raises:
          UserError: a formula with switches per head; read `head(h)` instead.
        """
        none, all_ = self.bounds(query, key)
        return (all_ * 1 - none * 1).astype("int8")

    def dense(self, q_tokens: Tokens, k_tokens: Tokens):
        """The whole mask, bool (batch, T, S). For oracles and pictures: no mixer builds it.

        Raises:
          UserError: a field that the Tokens lack, or a formula with switches per head; read `head(h)` instead.
        """
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
                    f"{', '.join(map(repr, tokens.names))}{nearest(name, tokens.names)}: "
                    f"add it with tokens.replace({name}=...)."
                )

    def _head(self, index: int) -> Mask:
        return self


class Atom(Mask):
    """A formula that is not made of others."""

    about: tuple = ()
    """What the atom speaks of: two of a class can be said as one only where this is the same."""

    def meet(self, other: Mask, holds: bool, other_holds: bool) -> Mask | None:
        """One term for this atom (negated unless it `holds`) and another about the same, if there is a simple one."""
        return None


@dataclass(frozen=True, repr=False)
class Constant(Atom):
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
    """Visible where every term is. Made by `&`, which keeps no two terms that one term can say."""

    terms: tuple[Mask, ...]

    is_band = property(lambda self: any(term.is_band for term in self.terms))

    @property
    def query_reads(self):
        return frozenset().union(*(term.query_reads for term in self.terms))

    @property
    def key_reads(self):
        return frozenset().union(*(term.key_reads for term in self.terms))

    @property
    def heads(self):
        return next((term.heads for term in self.terms if term.heads), None)

    def tile(self, query, key):
        return functools.reduce(operator.and_, (term.tile(query, key) for term in self.terms))

    def select(self, query, key, shown, hidden):
        for term in self.terms:
            shown = term.select(query, key, shown, hidden)
        return shown

    def bounds(self, query, key):
        (none, all_), *rest = (term.bounds(query, key) for term in self.terms)
        for other_none, other_all in rest:
            none, all_ = none | other_none, all_ & other_all
        return none, all_

    def _head(self, index):
        first, *rest = (term.head(index) for term in self.terms)
        for term in rest:
            first = first & term
        return first

    def __repr__(self):
        return " & ".join(f"({term!r})" if _is_or(term) else repr(term) for term in self.terms)


@dataclass(frozen=True, repr=False)
class Not(Mask):
    """Visible where the term is not. A disjunction is the negation of a conjunction of negations, and prints as `|`."""

    term: Mask

    is_band = property(lambda self: self.term.is_band)

    def __invert__(self):
        return self.term

    @property
    def query_reads(self):
        return self.term.query_reads

    @property
    def key_reads(self):
        return self.term.key_reads

    @property
    def heads(self):
        return self.term.heads

    def tile(self, query, key):
        if _is_or(self):
            return functools.reduce(operator.or_, ((~term).tile(query, key) for term in self.term.terms))
        return ~self.term.tile(query, key)

    def select(self, query, key, shown, hidden):
        if not _is_or(self):
            return self.term.select(query, key, hidden, shown)
        for term in self.term.terms:
            hidden = (~term).select(query, key, shown, hidden)
        return hidden

    def bounds(self, query, key):
        none, all_ = self.term.bounds(query, key)
        return all_, none

    def _head(self, index):
        return ~self.term.head(index)

    def __repr__(self):
        if _is_or(self):
            return " | ".join(repr(~term) for term in self.term.terms)
        return f"~{self.term!r}"


def _is_or(mask: Mask) -> bool:
    return isinstance(mask, Not) and isinstance(mask.term, And)


def _conjunction(left: Mask, right: Mask) -> Mask:
    """left & right: flattened, and terms that one term can say are fused, where the first of them stood."""
    if left.heads and right.heads and left.heads != right.heads:
        raise UserError(
            f"{left} has switches for {left.heads} heads and {right} for {right.heads}: "
            "give all switches of a formula as many values."
        )
    terms = list(_terms(left))
    for term in _terms(right):
        place = len(terms)
        while fusing := [(i, fused) for i, other in enumerate(terms) if (fused := _fuse(other, term)) is not None]:
            index, term = fusing[0]
            del terms[index]
            place = min(place, index)
        terms.insert(place, term)
    contradiction = any(_is_or(term) and set(term.term.terms) <= set(terms) for term in terms)
    if contradiction:
        return Constant(False)
    return And(tuple(terms)) if len(terms) > 1 else terms[0]


def _terms(mask: Mask) -> tuple[Mask, ...]:
    return mask.terms if isinstance(mask, And) else (mask,)


def _fuse(left: Mask, right: Mask) -> Mask | None:
    """One term for left & right, or None where there is no simple one."""
    if left == right or Constant(True) in (left, right):
        return right if left == Constant(True) else left
    if left == ~right or Constant(False) in (left, right):
        return Constant(False)
    atom, other = (mask.term if isinstance(mask, Not) else mask for mask in (left, right))
    if isinstance(atom, Atom) and type(atom) is type(other) and atom.about == other.about:
        return atom.meet(other, atom is left, other is right)
    return None


def nearest(name: str, known) -> str:
    """ " (did you mean 'x'?)", or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
