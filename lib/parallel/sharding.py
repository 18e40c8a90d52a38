"""What every way of crossing devices shares: the mesh axes of attention's arrays, checks, and the map over shards."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from striate.lib import masks
from striate.lib.errors import UserError


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
        return self.mesh.shape[self.axis]

    def forward(self, mask, scale, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens):
        self._check(q_BTHD, k_BSKD)
        array, row, tokens = self._specs()

        def shard(*arrays):
            return self.shard_forward(mask, scale, *arrays)

        return self._over_shards(shard, (array, array, array, tokens, tokens), (array, row))(
            q_BTHD, k_BSKD, v_BSKV, *self._needed(mask, q_tokens, k_tokens)
        )

    def backward(self, mask, scale, q_BTHD, k_BSKD, v_BSKV, q_tokens, k_tokens, d_out, lse, delta):
        array, row, tokens = self._specs()

        def shard(*arrays):
            return self.shard_backward(mask, scale, *arrays)

        specs = (array, array, array, tokens, tokens, array, row, row)
        return self._over_shards(shard, specs, (array, array, array))(
            q_BTHD, k_BSKD, v_BSKV, *self._needed(mask, q_tokens, k_tokens), d_out, lse, delta
        )

    def shard_forward(self, mask: masks.Mask, scale, q, k, v, query_fields, key_fields):
        """On one device: (out, lse) of its queries, from its shards of everything."""
        raise NotImplementedError

    def shard_backward(self, mask: masks.Mask, scale, q, k, v, query_fields, key_fields, d_out, lse, delta):
        """On one device: float32 gradients of its shards of q, k and v."""
        raise NotImplementedError

    def _over_shards(self, function, in_specs, out_specs):
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _specs(self):
        batch = tuple(name for name in self.batch if name in self.mesh.shape) or None
        heads = self.heads if self.heads in self.mesh.shape else None
        return P(batch, self.axis, heads, None), P(batch, self.axis, heads), P(batch, self.axis)

    def _needed(self, mask, q_tokens, k_tokens):
        # Only the fields that the mask reads travel; one is always there to give the shapes.
        return (
            {name: q_tokens[name] for name in mask.query_fields | {"position"}},
            {name: k_tokens[name] for name in mask.key_fields | {"position"}},
        )

    def _check(self, q, k) -> None:
        array = self._specs()[0]
        dimensions = (("batch", q.shape[0], array[0]), ("length", q.shape[1], self.axis))
        dimensions += (("key length", k.shape[1], self.axis), ("query heads", q.shape[2], array[2]))
        for name, size, axes in (*dimensions, ("key/value heads", k.shape[2], array[2])):
            names = (axes,) if isinstance(axes, str) else axes or ()
            parts = 1
            for axis in names:
                parts *= self.mesh.shape[axis]
            if size % parts:
                raise UserError(
                    f"{name} {size} does not divide over the {parts} shards of mesh axes {', '.join(names)}: "
                    f"make it a multiple of {parts} or change the mesh."
                )
