"""Masks as text: what `str` of a mask prints, `parse` reads."""

from __future__ import annotations

import ast

from striate.lib.errors import UserError
from striate.lib.masks import formulas
from striate.lib.masks.algebra import Mask, nearest

ATOMS = ("difference", "table", "modulo", "switch")
USUAL = ("causal", "at_least", "after", "same", "window", "sink", "prefix", "query", "key", "everything", "nothing")
_FORMULAS = {name: getattr(formulas, name) for name in (*USUAL, *ATOMS)}
_EXAMPLE = "causal() & same('document')"


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


def _build(node: ast.expr, text: str) -> Mask:
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _build(left, text) & _build(right, text)
        case ast.BinOp(left, ast.BitOr(), right):
            return _build(left, text) | _build(right, text)
        case ast.UnaryOp(ast.Invert(), operand):
            return ~_build(operand, text)
        case ast.Call(ast.Name(name), args, keywords):
            if name not in _FORMULAS:
                raise UserError(
                    f"The mask {text!r} uses {name!r}, which is no mask{nearest(name, _FORMULAS)}; "
                    f"there are {', '.join(_FORMULAS)}."
                )
            literal = [_literal(arg, text) for arg in args]
            return _FORMULAS[name](*literal, **{k.arg: _literal(k.value, text) for k in keywords})
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
            f"The mask {text!r} has the argument {ast.unparse(node)}; "
            "arguments are numbers, quoted field names, True, False and lists of them."
        ) from error
