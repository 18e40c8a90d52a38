"""How attention is cut on every kind of chip: a table in blocks.json, filled by benchmarks/tpu_tune.py."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax

from striate.pallas_kernels.tpu.chips import LANES, target

LARGE = 2**19  # logits of a part that gains by being cut in two, so that one is ahead of the other


class Parts(NamedTuple):
    """How a tile is cut: lengths of a part in queries and keys, and how many parts the products are ahead."""

    queries: int
    keys: int
    ahead: int

    def of(self, rows: slice, keys: slice) -> Parts:
        """Those of some rows and keys of a tile: no longer, dividing them; not a large one alone where one is ahead."""
        whole = rows.stop - rows.start, keys.stop - keys.start
        queries, length = map(_divisor, whole, self[:2])
        if self.ahead and (queries, length) == whole and queries * length >= LARGE:
            queries = _divisor(queries, queries // 2)
        return Parts(queries, length, self.ahead)


class Blocks(NamedTuple):
    """How attention is cut.

    Attributes:
      tile: queries and keys of a block.
      forward, backward: the parts of a tile in the two passes.
    """

    tile: tuple[int, int]
    forward: Parts
    backward: Parts


FILE = Path(__file__).with_name("blocks.json")
DEFAULT = Blocks((1024, 1024), Parts(512, 512, 1), Parts(256, 1024, 0))


@functools.cache
def table() -> dict[str, dict[int, Blocks]]:
    """For every chip and for bytes of a head (head_dim 128 in bfloat16 is 256) what serves best. Assign to try others.

    Example:
      table()["v5p"][256] = Blocks((1024, 2048), Parts(256, 1024, 0), Parts(512, 512, 1))
    """
    rows = json.loads(FILE.read_text())
    found: dict[str, dict[int, Blocks]] = {}
    for row in rows:
        cut = Blocks(tuple(row["tile"]), Parts(*row["forward"]), Parts(*row["backward"]))
        found.setdefault(row["chip"], {})[row["bytes"]] = cut
    return found


def blocks(k: jax.Array) -> Blocks:
    """For keys (..., head_dim) on the chip that the program is for."""
    return of(target(), k)


def of(chip: str | None, k: jax.Array) -> Blocks:
    """For keys (..., head_dim) on a chip."""
    cuts = table().get(chip, {})
    wide_enough = [size for size in cuts if size >= k.shape[-1] * k.dtype.itemsize]
    return cuts[min(wide_enough, default=max(cuts))] if cuts else DEFAULT


def _divisor(length: int, longest: int) -> int:
    """The longest part, of at most `longest`, into which a length can be cut: of whole LANES, where the length is."""
    unit = LANES if length % LANES == 0 else length
    return max(part for part in range(unit, max(longest, unit) + 1, unit) if length % part == 0)
