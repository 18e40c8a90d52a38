"""What every way of crossing devices shares: the mesh axes of attention's arrays, checks, and the map over shards."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from striate.lib import masks
from striate.lib.errors import UserError
from striate.lib.scores import Score
from striate.lib.tiles import Task
from striate.lib.tokens import Tokens


@dataclass(frozen=True)
class SequenceParallel:
    """Attention whose sequence is sharded over one mesh axis.

    Attributes:
      mesh: the devices; its axes are Auto, and those named here that it does not have are passed over.
      axis: mesh axis of the sequence, of queries and keys alike.
      batch: mesh axes of the batch.
      heads: mesh axis of the heads, of queries and of keys.
    """

    mesh: Mesh
    axis: str = "sequence"
    batch: tuple[str, ...] = ("data", "fsdp")
    heads: str = "tensor"

    def __post_init__(self):
        if self.axis not in self.mesh.shape:
            raise UserError(
                f"{type(self).__name__} spreads the sequence over the mesh axis {self.axis!r}, but the mesh has "
                f"{dict(self.mesh.shape)}: name one of these axes."
            )
        if AxisType.Explicit in self.mesh.axis_types:
            raise UserError(
                f"{type(self).__name__} needs a mesh of Auto axes, and {self.mesh.axis_names} have "
                f"{self.mesh.axis_types}: pass axis_types=(jax.sharding.AxisType.Auto,) * {len(self.mesh.shape)} to "
                "jax.make_mesh."
            )

    @property
    def shards(self) -> int:
        """Of the sequence."""
        return math.prod(self.mesh.shape[name] for name in self.sequence_axes)

    @property
    def sequence_axes(self) -> tuple[str, ...]:
        """The mesh axes that cut the sequence."""
        return (self.axis,)

    def for_tokens(self, mask: masks.Mask, q_tokens: Tokens, k_tokens: Tokens) -> SequenceParallel:
        """What is to be used for these Tokens, which may not be known before the program runs."""
        return self

    def forward(self, task, score, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens):
        array, row, tokens = self._specs()
        needed = self._needed(task.mask, score, q_tokens, k_tokens)

        def shard(score, *arrays):
            return self.shard_forward(task, score, *arrays)

        if self._inside:
            return shard(score, q_BTHD, k_BSKD, v_BSKV, *needed)
        self._check(q_BTHD, k_BSKD)
        in_specs = (self._score_specs(score), array, array, array, tokens, tokens)
        return self._over_shards(shard, in_specs, (array, row))(score, q_BTHD, k_BSKD, v_BSKV, *needed)

    def backward(self, task, score, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens, d_out, lse, delta):
        array, row, tokens = self._specs()
        needed = self._needed(task.mask, score, q_tokens, k_tokens)

        def shard(score, *arrays):
            d_score, *gradients = self.shard_backward(task, score, *arrays)
            # All devices share the parameters of the score, but for those of the heads that are spread.
            spread = (*self._present(self.batch), *self.sequence_axes)
            shared = (*spread, *self._present((self.heads,)))
            d_score = jax.tree.map(lambda x: jax.lax.psum(x, spread if x.ndim else shared), d_score)
            return d_score, *gradients

        if self._inside:
            return self.shard_backward(task, score, q_BTHD, k_BSKD, v_BSKV, *needed, d_out, lse, delta)
        in_specs = (self._score_specs(score), array, array, array, tokens, tokens, array, row, row)
        out_specs = self._score_specs(score), array, array, array
        return self._over_shards(shard, in_specs, out_specs)(score, q_BTHD, k_BSKD, v_BSKV, *needed, d_out, lse, delta)

    def shard_forward(self, task: Task, score: Score, q, k, v, query_fields, key_fields):
        """On one device: (out, lse) of its queries, from its shards of everything."""
        raise NotImplementedError

    def shard_backward(self, task, score, q, k, v, query_fields, key_fields, d_out, lse, delta):
        """On one device: its share of d_score, and the gradients of its shards of q, k and v."""
        raise NotImplementedError

    @property
    def _inside(self) -> bool:
        """Whether the caller has mapped over the sequence axis already: arrays are shards, heads too."""
        return set(self.sequence_axes) <= set(jax.sharding.get_abstract_mesh().manual_axes)

    def _over_shards(self, function, in_specs, out_specs):
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _present(self, axes) -> tuple[str, ...]:
        return tuple(name for name in axes if name in self.mesh.shape)

    def _score_specs(self, score: Score) -> Score:
        heads = self.heads if self.heads in self.mesh.shape else None
        return jax.tree.map(lambda x: P(heads) if x.ndim else P(), score)

    def _specs(self):
        batch = self._present(self.batch) or None
        heads = self.heads if self.heads in self.mesh.shape else None
        length = self.sequence_axes
        return P(batch, length, heads, None), P(batch, length, heads), P(batch, length)

    def _needed(self, mask, score, q_tokens, k_tokens):
        # Only the fields that mask and score read travel; one is always there to give the shapes.
        return (
            {name: q_tokens[name] for name in mask.query_fields | score.reads | {"position"}},
            {name: k_tokens[name] for name in mask.key_fields | score.reads | {"position"}},
        )

    def _check(self, q, k) -> None:
        batch, length, heads, _ = self._specs()[0]
        dimensions = ("batch", q.shape[0], batch), ("length", q.shape[1], length), ("key length", k.shape[1], length)
        self._check_division(*dimensions, ("query heads", q.shape[2], heads), ("key/value heads", k.shape[2], heads))

    def _check_division(self, *dimensions) -> None:
        for name, size, axes in dimensions:
            names = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(self.mesh.shape[axis] for axis in names)
            if size % parts:
                raise UserError(
                    f"{name} {size} does not divide over the {parts} shards of mesh axes {', '.join(names)}: "
                    f"make it a multiple of {parts} or change the mesh."
                )
