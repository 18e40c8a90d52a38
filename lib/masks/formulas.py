"""The formulas by name: the four atoms, checked, and the usual masks made of them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np

from striate.lib.errors import UserError
from striate.lib.masks.algebra import Constant, Mask
from striate.lib.masks.atoms import Difference, Modulo, Switch, Table, as_rows
from striate.lib.masks.summaries import BITS


def difference(query_field: str | None, key_field: str | None, low: int | None = None, high: int | None = None) -> Mask:
    """low <= q.query_field - k.key_field <= high; a field of None is the constant 0, a bound of None is no bound.

    Raises:
      UserError: no field at all, a field that is not text, or a bound that is not a whole number.
    """
    call = f"difference({query_field!r}, {key_field!r}, {low!r}, {high!r})"
    _check_fields(call, query_field, key_field)
    if not all(bound is None or isinstance(bound, Integral) for bound in (low, high)):
        raise UserError(f"{call} cannot be: bounds are whole numbers or None.")
    low, high = (None if bound is None else int(bound) for bound in (low, high))
    if low is not None and high is not None and low > high:
        return Constant(False)
    return Constant(True) if low is None and high is None else Difference(query_field, key_field, low, high)


def table(query_field: str | None, key_field: str | None, matrix: Sequence[Sequence[bool]]) -> Mask:
    """matrix[q.query_field][k.key_field], at most 32 x 32; a class that the matrix does not have (negative, or too
    large) sees nothing and is seen by nothing. A field of None is the constant 0.

    Raises:
      UserError: no field at all, a field that is not text, or a matrix that is empty, ragged, too large or not boolean.
    """
    call = f"table({query_field!r}, {key_field!r}, ...)"
    _check_fields(call, query_field, key_field)
    values = np.array(matrix, dtype=object)
    if values.ndim != 2 or not 1 <= min(values.shape) <= max(values.shape) <= BITS:
        raise UserError(
            f"{call} cannot be: its matrix has the shape {values.shape}, and needs rows of equal length, "
            f"from (1, 1) to ({BITS}, {BITS})."
        )
    if wrong := [x for x in values.reshape(-1).tolist() if x not in (0, 1)]:
        raise UserError(f"{call} cannot be: its matrix holds {wrong[0]!r}, and entries are 0 or 1, False or True.")
    return Table(query_field, key_field, as_rows(values.astype(bool))) if values.any() else Constant(False)


def modulo(query_field: str | None, key_field: str | None, divisor: int, remainder: int = 0) -> Mask:
    """(q.query_field - k.key_field) mod divisor == remainder mod divisor; a field of None is the constant 0.

    Raises:
      UserError: no field at all, a field that is not text, or a number that is not whole, or a divisor below 1.
    """
    call = f"modulo({query_field!r}, {key_field!r}, {divisor!r}, {remainder!r})"
    _check_fields(call, query_field, key_field)
    if not (isinstance(divisor, Integral) and isinstance(remainder, Integral) and divisor >= 1):
        raise UserError(f"{call} cannot be: the divisor is a whole number from 1 on, the remainder a whole number.")
    return Constant(True) if divisor == 1 else Modulo(query_field, key_field, int(divisor), int(remainder % divisor))


def switch(values: bool | Sequence[bool]) -> Mask:
    """Every pair where True, no pair where False: a bool for the whole formula, or one for each head.

    Raises:
      UserError: anything but a bool, or a sequence of at least one.
    """
    array = np.array(values, dtype=object)
    per_head = array.reshape(-1).tolist()
    if array.ndim > 1 or not per_head or not all(value in (0, 1) for value in per_head):
        raise UserError(
            f"switch({values!r}) cannot be: it takes True, False, or a list of them with one for each head."
        )
    return Constant(bool(per_head[0])) if len(set(per_head)) == 1 else Switch(tuple(map(bool, per_head)))


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


def _negative(bound: int | None) -> int | None:
    return None if bound is None else -bound


def _check_fields(call: str, *names: str | None) -> None:
    if not all(name is None or isinstance(name, str) for name in names):
        raise UserError(f"{call} cannot be: fields are names in quotes.")
    if set(names) == {None}:
        raise UserError(f"{call} compares nothing: name a query field or a key field.")
