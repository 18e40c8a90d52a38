"""The atoms: formulas that are not made of others."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import numpy as np

from striate.lib.errors import UserError
from striate.lib.masks.algebra import Atom, Constant, Not
from striate.lib.masks.summaries import BITS, bit, reads, signed, summary, value, where

LEAST = -(2**31)

EXTENT = ("least",), ("greatest",)


def _reach(atom, query, key):
    """The least and the greatest difference of a query and a key of two blocks; both occur."""
    least = summary(query, atom.query_field, "least") - summary(key, atom.key_field, "greatest")
    return least, summary(query, atom.query_field, "greatest") - summary(key, atom.key_field, "least")


@dataclass(frozen=True, repr=False)
class Difference(Atom):
    """low <= q.a - k.b <= high; a field of None is the constant 0, a bound of None is no bound."""

    query_field: str | None
    key_field: str | None
    low: int | None = None
    high: int | None = None

    about = property(lambda self: (self.query_field, self.key_field))
    query_reads = property(lambda self: reads(self.query_field, *EXTENT))
    key_reads = property(lambda self: reads(self.key_field, *EXTENT))
    is_band = property(lambda self: None not in (self.query_field, self.key_field, self.low, self.high))

    def tile(self, query, key):
        # One comparison a pair. What is added is added on the side that has fewer entries.
        query, key = value(query, self.query_field), value(key, self.key_field)

        def moved(by: int):
            return (query, key + np.int32(by)) if np.size(key) <= np.size(query) else (query - np.int32(by), key)

        if self.low == self.high:
            return operator.eq(*moved(self.low))
        if self.high is None:
            return operator.ge(*moved(self.low))
        if self.low is None:
            return operator.le(*moved(self.high))
        if None in self.about or not query.dtype == key.dtype == np.int32:
            return operator.ge(*moved(self.low)) & operator.le(*moved(self.high))
        # Sums of integers wrap around: moved so that it begins at the least of them, an interval has but one end.
        begin = self.low + LEAST if self.low >= 0 else self.low - LEAST
        return operator.sub(*moved(begin)) <= self.high - self.low + LEAST

    def bounds(self, query, key):
        least, greatest = _reach(self, query, key)
        low, high = least if self.low is None else self.low, greatest if self.high is None else self.high
        return (greatest < low) | (least > high), (least >= low) & (greatest <= high)

    def __invert__(self):
        """The negation of a one-sided bound is the other one."""
        if self.low is None:
            return Difference(self.query_field, self.key_field, self.high + 1, None)
        if self.high is None:
            return Difference(self.query_field, self.key_field, None, self.low - 1)
        return Not(self)

    def meet(self, other, holds, other_holds):
        """The differences that both allow, where they are one interval or all but one interval."""
        pairs = [(a, b) for a in self._intervals(holds) for b in other._intervals(other_holds)]
        both = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in pairs if max(a[0], b[0]) <= min(a[1], b[1])]
        if not both:
            return Constant(False)
        if len(both) == 1:
            low, high = (None if math.isinf(bound) else bound for bound in both[0])
            return Difference(self.query_field, self.key_field, low, high)
        if len(both) == 2 and math.isinf(both[0][0]) and math.isinf(both[1][1]):
            return Not(Difference(self.query_field, self.key_field, both[0][1] + 1, both[1][0] - 1))
        return None

    def _intervals(self, holds: bool) -> list[tuple[float, float]]:
        """The differences that are visible, or those that are not, as intervals in rising order."""
        low, high = -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        if holds:
            return [(low, high)]
        return [(a, b) for a, b in ((-math.inf, low - 1), (high + 1, math.inf)) if a < b]

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
            low, high = (None if bound is None else -bound for bound in (high, low))
            return f"key({key!r}, {low}, {high})"
        return f"difference({query!r}, {key!r}, {low}, {high})"


@dataclass(frozen=True, repr=False)
class Table(Atom):
    """matrix[q.a][k.b] for classes 0 <= q.a, k.b < 32; a class that the matrix does not have sees and shows nothing."""

    query_field: str | None
    key_field: str | None
    matrix: tuple[tuple[bool, ...], ...]

    about = property(lambda self: (self.query_field, self.key_field))
    query_reads = property(lambda self: reads(self.query_field, *EXTENT, ("classes",)))
    key_reads = property(lambda self: reads(self.key_field, *EXTENT, ("classes",)))

    @property
    def _rows(self) -> list[np.int32]:
        """Of every query class, the key classes that it sees, as bits."""
        return [signed(sum(visible << c for c, visible in enumerate(row))) for row in self.matrix]

    def tile(self, query, key):
        """Bits of what a query sees, met by the bit of what a key is: two operations on the tile, and no gather."""
        query_class, seen = value(query, self.query_field), np.int32(0)
        for c, row in enumerate(self._rows):
            seen = where(query_class == c, row, seen)
        return (seen & bit(value(key, self.key_field), len(self.matrix[0]))) != 0

    def bounds(self, query, key):
        """Exact: the submatrix of the classes that the two blocks hold, by what any and what every query class sees."""
        present, keys = summary(query, self.query_field, "classes"), summary(key, self.key_field, "classes")
        any_sees, every_sees = np.int32(0), np.int32(-1)
        for c, row in enumerate(self._rows):
            here = (present >> c & 1) != 0
            any_sees, every_sees = any_sees | where(here, row, 0), every_sees & where(here, row, -1)
        inside = _inside(query, self.query_field, len(self.matrix)) & _inside(key, self.key_field, len(self.matrix[0]))
        return (any_sees & keys) == 0, inside & ((every_sees & keys) == keys)

    def meet(self, other, holds, other_holds):
        """One matrix for both; a class that neither has is visible where both are negated."""
        matrices = np.array(self.matrix), np.array(other.matrix)
        shape = np.max([matrix.shape for matrix in matrices], axis=0)
        one, two = (
            np.pad(matrix, [(0, n - m) for n, m in zip(shape, matrix.shape, strict=True)]) for matrix in matrices
        )
        both = (one == holds) & (two == other_holds)
        if not (holds or other_holds):
            return Not(Table(self.query_field, self.key_field, as_rows(~both)))
        return Table(self.query_field, self.key_field, as_rows(both)) if both.any() else Constant(False)

    def __repr__(self):
        matrix = [[int(visible) for visible in row] for row in self.matrix]
        return f"table({self.query_field!r}, {self.key_field!r}, {matrix})"


def _inside(summaries, field: str | None, size: int):
    return (summary(summaries, field, "least") >= 0) & (summary(summaries, field, "greatest") < size)


def as_rows(matrix: np.ndarray) -> tuple[tuple[bool, ...], ...]:
    """A matrix that hashes."""
    return tuple(map(tuple, matrix.tolist()))


@dataclass(frozen=True, repr=False)
class Modulo(Atom):
    """(q.a - k.b) mod divisor == remainder, with 0 <= remainder < divisor; a field of None is the constant 0."""

    query_field: str | None
    key_field: str | None
    divisor: int
    remainder: int = 0

    about = property(lambda self: (self.query_field, self.key_field, self.divisor))
    query_reads = property(lambda self: reads(self.query_field, *self._reductions(self.remainder)))
    key_reads = property(lambda self: reads(self.key_field, *self._reductions(0)))

    def _reductions(self, remainder: int) -> tuple[tuple, ...]:
        return (("residues", self.divisor, remainder),) if self.divisor <= BITS else EXTENT

    def tile(self, query, key):
        """Residues of the column and of the row; the tile itself is one comparison."""
        query_residue = (value(query, self.query_field) - self.remainder) % self.divisor
        return query_residue == value(key, self.key_field) % self.divisor

    def bounds(self, query, key):
        """By residue bits, exact; for a larger divisor by extents, exact where both blocks are runs of neighbours."""
        if self.divisor <= BITS:
            residues = summary(query, self.query_field, "residues", self.divisor, self.remainder)
            key_residues = summary(key, self.key_field, "residues", self.divisor, 0)
            bits = residues.astype(np.uint32)  # bit 31 alone, less one, would overflow as int32
            only_one = (bits & (bits - 1)) == 0
            return (residues & key_residues) == 0, (residues == key_residues) & only_one
        least, greatest = _reach(self, query, key)
        until_visible = (self.remainder - least) % self.divisor
        return until_visible > greatest - least, (until_visible == 0) & (least == greatest)

    def __invert__(self):
        """What is not even is odd."""
        if self.divisor == 2:
            return Modulo(self.query_field, self.key_field, 2, 1 - self.remainder)
        return Not(self)

    def meet(self, other, holds, other_holds):
        """Of two remainders of one division: nothing, or the one that is not negated."""
        if holds and other_holds:
            return Constant(False)
        return self if holds else other if other_holds else None

    def __repr__(self):
        remainder = f", {self.remainder}" if self.remainder else ""
        return f"modulo({self.query_field!r}, {self.key_field!r}, {self.divisor}{remainder})"


@dataclass(frozen=True, repr=False)
class Switch(Atom):
    """Every pair in the heads whose value is True, no pair in the others."""

    values: tuple[bool, ...]
    query_reads = key_reads = frozenset()

    @property
    def heads(self):
        return len(self.values)

    def _head(self, index):
        return Constant(self.values[index])

    def tile(self, query, key):
        raise UserError(
            f"{self} makes another formula of every head: read head(h) of the mask, h from 0 to {self.heads - 1}, "
            f"or all of for_heads({self.heads})."
        )

    bounds = tile

    def __invert__(self):
        return Switch(tuple(not value for value in self.values))

    def meet(self, other, holds, other_holds):
        both = tuple(a and b for a, b in zip(self.values, other.values, strict=True))
        return Switch(both) if any(both) else Constant(False)

    def __repr__(self):
        return f"switch({list(self.values)})"
