"""Tokens: what is known of every token. Everything that decides who sees whom reads them, never array indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from striate.lib.errors import UserError

PADDING = -1
"""`document` of a padding token; padding queries count as PADDING - 1, so that padding never sees padding."""


@jax.tree_util.register_pytree_with_keys_class
class Tokens:
    """Named int32 arrays (batch, length), one value per token: a pytree that is sharded, permuted and sent around.

    `position` orders the tokens of a document; `document` tells packed documents apart and is -1 on padding. Any
    further field may be named: `Tokens(position=p, document=d, frame=f)`; read one as `tokens["frame"]`.

    Raises:
      UserError: a field that is not of rank 2, not int32 (or int64), or not of the shape of `position`.
    """

    def __init__(self, position, document=None, **fields):
        document = position * 0 if document is None else document
        fields = {"position": position, "document": document, **fields}
        for name, value in fields.items():
            if value.ndim != 2 or value.shape != position.shape:
                needed = f" of position, {position.shape}" if position.ndim == 2 else ""
                raise UserError(
                    f"Tokens field {name!r} has shape {value.shape}; every field needs the shape (batch, length)"
                    f"{needed}: reshape or broadcast it first."
                )
            # Narrow and unsigned integers would wrap around in differences.
            if value.dtype not in (np.int32, np.int64):
                raise UserError(f"Tokens field {name!r} has dtype {value.dtype}; fields are int32: cast it first.")
        self._fields = dict(sorted(fields.items()))

    @classmethod
    def arange(cls, batch: int, length: int) -> Tokens:
        """One document per row, positions 0 .. length - 1, in natural order."""
        position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        return cls(position=position, document=jnp.zeros_like(position))

    def __getitem__(self, name: str):
        return self._fields[name]

    @property
    def position(self):
        return self._fields["position"]

    @property
    def document(self):
        return self._fields["document"]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._fields)

    @property
    def shape(self) -> tuple[int, int]:
        return self.position.shape

    def fields(self) -> Mapping[str, jax.Array]:
        return dict(self._fields)

    def replace(self, **fields) -> Tokens:
        """The same tokens with some fields set or added."""
        return Tokens(**{**self._fields, **fields})

    def map(self, function: Callable) -> Tokens:
        """`function` applied to every field."""
        return Tokens(**{name: function(value) for name, value in self._fields.items()})

    def as_queries(self) -> Tokens:
        """The tokens in the role of queries: padding has document -2, so that it matches no key, padding or not."""
        return self.replace(document=self.document - (self.document == PADDING))

    def __repr__(self) -> str:
        return f"Tokens({', '.join(self._fields)}; shape={getattr(self.position, 'shape', None)})"

    def tree_flatten_with_keys(self):
        children = [(jax.tree_util.GetAttrKey(name), value) for name, value in self._fields.items()]
        return children, tuple(self._fields)

    @classmethod
    def tree_unflatten(cls, names, children):
        # JAX unflattens with placeholders too (specs, None), so nothing is checked here.
        tokens = object.__new__(cls)
        tokens._fields = dict(zip(names, children, strict=True))
        return tokens
