"""Attention of a few queries to a long cache on a TPU: every block of keys that the mask shows is read once.

Memory is what limits it, so nothing may copy the cache first. XLA lays out keys (B, S, K, D) so that tiles of 8 x 128
hold no padding, and the kernel takes an array whose bytes lie as they do then (`View`):

    D % 128 == 0, K fills tiles       (B, 1, S K, D)    a key of every head for each token
    D % 128 == 0, other K             (B, K, S, D)
    other D                           (B, K, D, S)      tokens on lanes

In the first the queries of all heads are rows of one product with the keys of all heads, and a mask hides the pairs of
different heads: the matrix unit takes in as many keys as it would head by head, for at most 128 rows in the same time.

One step of the grid is a live block of keys, with all their heads, of one row of the batch; the sums m, l, acc of
forward.py stay in VMEM while that row lasts. Keys may lie in pages, where the index maps look up.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from striate.lib.masks import ALL, MIXED, NONE, key, same
from striate.lib.tiles import INSIDE, Partial, Tiled, block_length, natural
from striate.pallas_kernels.common import LN2, is_plain, like, scored
from striate.pallas_kernels.tpu.chips import LANES
from striate.pallas_kernels.tpu.parts import NN, NT, compiler_params, in_turn, product, scaled, spread
from striate.pallas_kernels.tpu.steps import COLUMN, FIRST, LIVE, MASKED, live_steps, over_segments

QUERIES, ROWS = 16, 1024  # no more queries, nor rows of all heads, than that
SUBLANES = 16  # rows of a tile of bfloat16
BLOCK = 2**20  # bytes of a block of keys, about
PART = 1024  # keys whose logits are computed at a time
FEW = 64  # rows that meet the keys of all heads
SLOTS = 16  # pages of a block at most
HEAD = "_head"


@dataclass(frozen=True)
class Decode(Tiled):
    """The forward pass for a few queries. Keys and values are taken as they are: (B, S, K, D), not padded.

    Attributes:
      interpret: that of pallas_call.
      page: tokens of a page, a divisor of a block of keys, where they lie in pages; else 0.
    """

    unit: ClassVar[float] = LN2
    interpret: Any = False
    page: int = 0

    @property
    def slots(self) -> int:
        """Pages of a block of keys."""
        return self.tile[1] // self.page if self.page else 1

    @staticmethod
    def suits(q_BTHD) -> bool:
        """Whether there are so few queries that to read the keys is what takes the time."""
        return q_BTHD.shape[1] <= QUERIES and q_BTHD.shape[1] * q_BTHD.shape[2] <= ROWS

    @classmethod
    def takes_pages(cls, q_BTHD, k_pages, v_pages) -> bool:
        """Whether pages can be read where they lie: there are few queries, and pages fill whole lanes, alone or not."""
        page, widths = k_pages.shape[1], (k_pages.shape[3], v_pages.shape[3])
        if page % LANES and (page < LANES // SLOTS or LANES % page or any(width % LANES for width in widths)):
            return False
        return cls.suits(q_BTHD)

    @classmethod
    def over(cls, mask, scale: float, q_BTHD, k_BSKD, interpret) -> Decode:
        """For these shapes."""
        token = k_BSKD.shape[2] * k_BSKD.shape[3] * k_BSKD.dtype.itemsize
        longest = max(BLOCK // (LANES * token), 1) * LANES
        block = block_length(k_BSKD.shape[1], longest, LANES)
        if k_BSKD.shape[1] % block:
            mask = mask & key(INSIDE, 1, 1)
        return cls(mask, scale, (q_BTHD.shape[1], block), interpret)

    @classmethod
    def over_pages(cls, mask, scale: float, q_BTHD, k_pages, pages: int, interpret) -> Decode:
        """For these shapes and a table of so many pages for each row of the batch."""
        page, size = k_pages.shape[1], math.prod(k_pages.shape[1:]) * k_pages.dtype.itemsize
        unit = max(LANES // page, 1)  # blocks are whole lanes
        slots = min(max(min(BLOCK // size, SLOTS) // unit, 1), -(-pages // unit)) * unit
        if pages % slots:
            mask = mask & key(INSIDE, 1, 1)
        return cls(mask, scale, (q_BTHD.shape[1], slots * page), interpret, page)

    def queries(self, score, q_BTHD, kv_heads):
        return self.rows(scaled(score, self.scale, q_BTHD), kv_heads)

    def keys_or_values(self, x_BSKD):
        return x_BSKD

    def attend_pages(self, score, q_BTHD, k_pages, v_pages, table, q_tokens, k_tokens):
        """(out (B, T, H, V), lse (B, T, H)), float32, where keys lie in pages.

        Args:
          k_pages, v_pages: (P, page, K, D) and (P, page, K, V).
          table: int32 (B, n), the pages of a row; those that the mask hides are not looked at.
          q_tokens, k_tokens: fields (B, T) and (B, n page).
        """
        q, length = self.queries(score, q_BTHD, k_pages.shape[2]), q_BTHD.shape[1]
        table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % self.slots)))
        arrays = score, q, k_pages, v_pages, *self.sides(score, q_tokens, k_tokens)
        partial = self.forward(*arrays, Partial.empty(q, v_pages.shape[3]), table)
        return tuple(natural(x, length) for x in partial.finish(self.unit, score.normalised))

    def forward(self, score, q, k, v, query_fields, key_fields, partial, table=None):
        """As for every Tiled; with `table`, int32 (B, pages of whole blocks), k and v are pages."""
        view, verdicts = View.of(q, k, v), self.verdicts(query_fields, key_fields)
        if self.page:
            by_page = Decode(self.mask, self.scale, (self.tile[0], self.page)).verdicts(query_fields, key_fields)
            verdicts, table = _by_block(by_page[:, 0], jnp.clip(table, 0, len(k) - 1), self.slots)
        leaves, tree = jax.tree.flatten(score)
        part = _divisor(self.tile[1] * view.keys, LANES, PART)
        rows = Rows(*q.shape[:4], view.groups, min(LANES, part))
        ragged = not self.page and k.shape[1] % self.tile[1]
        read = self.mask.fields | score.reads | ({INSIDE} if ragged else set())
        names = (*sorted(read or {"position"}), *[HEAD] * (view.keys > 1))
        cut = _divisor(rows.per_group, SUBLANES, LANES), part
        ranks = tuple(x.ndim for x in leaves)
        how = How(is_plain(score), tree, ranks, names, cut, rows.per_group, k.shape[1] * view.keys * bool(ragged))
        arrays = (
            *(rows.flat(q), view.see(k, 0), view.see(v, 1)),
            jnp.stack([rows.planes(rows.field(query_fields, name)) for name in names], axis=1),
            jnp.stack([key_fields.get(name, key_fields["position"]) for name in names], axis=1),
            [rows.planes(rows.parameter(x)) for x in leaves],
        )
        kernel = sequential_vmap(functools.partial(_call, self, view, how))

        def call(row, code, count, sums):
            pages = jnp.zeros(1, jnp.int32) if table is None else table[row, code // COLUMN].reshape(-1)
            return kernel(row, code, count, pages, *arrays, sums)

        return rows.partial(over_segments(live_steps(verdicts[..., None], self.slots), call, rows.sums(partial)))


class How(NamedTuple):
    """What a step of the kernel is to do. Static."""

    plain: bool  # the score leaves logits as they are
    tree: Any  # of the score's parameters
    ranks: tuple[int, ...]  # of these
    names: tuple[str, ...]  # of the fields that mask and score read
    cut: tuple[int, int]  # rows of one group, and keys, that are computed at a time
    per_group: int  # rows
    end: int  # keys that there are, where the last block reaches beyond them; else 0


class View(NamedTuple):
    """How the kernel sees keys and values: groups of heads, whose keys meet the rows of all these heads in one product.

    Attributes:
      groups: of heads.
      keys: of a group, for each token: its heads.
      woven: arrays are (B, 1, S K, D), else (B, K, S, D).
      across: whether keys, and values, are (B, K, D, S).
    """

    groups: int
    keys: int
    woven: bool
    across: tuple[bool, bool]

    @classmethod
    def of(cls, q_BKGTD, k_BSKD, v_BSKV) -> View:
        heads, widths = k_BSKD.shape[2], (k_BSKD.shape[3], v_BSKV.shape[3])
        across = tuple(width % LANES != 0 for width in widths)
        if any(across) or not (heads % 8 == 0 or (heads in (2, 4) and widths == (LANES, LANES))):
            return cls(heads, 1, False, across)
        # Few rows may meet the keys of all heads at once; more of them meet those of the heads that share a word.
        few = math.prod(q_BKGTD.shape[1:4]) <= FEW
        keys = heads if few else 4 // k_BSKD.dtype.itemsize
        return cls(heads // keys, keys, True, across)

    def see(self, x_BSKD, which: int):
        if self.across[which]:
            return x_BSKD.transpose(0, 2, 3, 1)
        return x_BSKD.reshape(len(x_BSKD), 1, -1, x_BSKD.shape[3]) if self.woven else x_BSKD.swapaxes(1, 2)

    def load(self, refs, which: int, group: int, keys: slice):
        """Keys or values of a group, (keys, D) or (D, keys), from the blocks that hold them one after the other."""
        across = self.across[which]
        length = refs[0].shape[2] if across else refs[0].shape[1] // (self.groups if self.woven else 1)
        pieces = []
        for number, ref in enumerate(refs):
            start, stop = max(keys.start - number * length, 0), min(keys.stop - number * length, length)
            if start < stop:
                pieces.append(self._of_group(ref, across, group, start, stop))
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=int(across))

    def _of_group(self, ref, across: bool, group: int, start: int, stop: int):
        if across:
            return ref[group, :, start:stop]
        if self.groups == 1 or not self.woven:
            return ref[group, start:stop]
        # A token has a word of 32 bits for each group, and rows of words can be strided over.
        tokens = pl.ds(start // self.keys * self.groups + group, (stop - start) // self.keys, self.groups)
        if self.keys == 1:
            return ref.at[0][tokens, :]
        return pltpu.bitcast(ref.at[0].bitcast(jnp.uint32)[tokens, :], ref.dtype)


class Rows(NamedTuple):
    """The queries of a row of the batch as rows of matrices, one for each group of heads, padded to whole tiles."""

    batch: int
    kv_heads: int
    group: int
    length: int
    groups: int
    lanes: int

    @property
    def per_group(self) -> int:
        return -(-self._real // SUBLANES) * SUBLANES

    @property
    def _real(self) -> int:
        return self.kv_heads * self.group * self.length // self.groups

    def flat(self, x_BKGT):
        """(n, K, G, T, ...) to (n, rows, ...)."""
        x = x_BKGT.reshape(x_BKGT.shape[0], self.groups, self._real, *x_BKGT.shape[4:])
        x = jnp.pad(x, [(0, self.per_group - self._real if axis == 2 else 0) for axis in range(x.ndim)])
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def heads(self, x_BR):
        """(n, rows, ...) back to (n, K, G, T, ...)."""
        x = x_BR.reshape(x_BR.shape[0], self.groups, self.per_group, *x_BR.shape[2:])[:, :, : self._real]
        return x.reshape(x.shape[0], self.kv_heads, self.group, self.length, *x.shape[3:])

    def planes(self, x_BR):
        """Every number in all lanes."""
        return jnp.broadcast_to(x_BR[..., None], (*x_BR.shape, self.lanes))

    def field(self, fields, name: str):
        """int32 (B, rows); a field that only the keys read is there as another one."""
        x = fields.get(name, fields["position"])[:, None, None]
        if name == HEAD:
            each = self.kv_heads // self.groups
            x = 0 * x + (jnp.arange(self.kv_heads, dtype=jnp.int32) % each)[None, :, None, None]
        return self.flat(jnp.broadcast_to(x, (self.batch, self.kv_heads, self.group, self.length)))

    def parameter(self, leaf):
        """Of a score: (n, rows), n for those that are arrays for each head."""
        per_head = leaf.reshape(leaf.shape[0], -1).T if leaf.ndim else leaf[None, None]
        shape = len(per_head), self.kv_heads, self.group
        x = jnp.broadcast_to(per_head, (len(per_head), self.kv_heads * self.group)).reshape(*shape, 1)
        return self.flat(jnp.broadcast_to(x, (*shape, self.length)))

    def sums(self, partial: Partial):
        """m, in all lanes; l, a sum for every lane; acc."""
        maximum, total, weighted = map(self.flat, partial)
        return self.planes(maximum), jnp.pad(total[..., None], [(0, 0)] * 2 + [(0, self.lanes - 1)]), weighted

    def partial(self, sums) -> Partial:
        maximum, total, weighted = sums
        return Partial(self.heads(maximum[..., 0]), self.heads(total.sum(-1)), self.heads(weighted))


class _Table(NamedTuple):
    """A parameter of a score with several numbers for each head, which `scores.lookup` reads one by one."""

    planes: tuple  # of shapes that broadcast with the logits

    @property
    def shape(self):
        return (len(self.planes),)

    def __getitem__(self, index):
        return self.planes[index[-1]]


def _by_block(by_page, table, slots: int):
    """(verdicts of blocks (B, 1, blocks), pages to read (B, blocks, slots)) from verdicts and pages (B, n).

    In place of a page that is hidden one of the same block is read that is not.
    """
    by_page, table = (x.reshape(x.shape[0], -1, slots) for x in (by_page, table))
    verdict = jnp.where((by_page == ALL).all(-1), ALL, jnp.where((by_page == NONE).all(-1), NONE, MIXED))
    shown = jnp.take_along_axis(table, jnp.argmax(by_page != NONE, axis=-1)[..., None], axis=-1)
    return verdict[:, None], jnp.where(by_page != NONE, table, shown)


def _call(kernel: Decode, view: View, how: How, row, code, count, pages, q, k, v, planes, keys, leaves, sums):
    """One call: the sums (m, l, acc) with what the steps listed add to them."""

    def of_row(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, row, *_: (row[i],) + (0,) * (x.ndim - 1))

    def of_keys(x, across: bool, slot: int):
        length = (kernel.page or kernel.tile[1]) * (view.keys * view.groups if view.woven else 1)
        shape = (None, *x.shape[1:3], length) if across else (None, x.shape[1], length, x.shape[3])

        def place(i, row, code, pages):
            outer, block = (pages[i * kernel.slots + slot], 0) if kernel.page else (row[i], code[i] // COLUMN)
            return (outer, 0, 0, block) if across else (outer, 0, block, 0)

        return pl.BlockSpec(shape, place)

    slots, carries = range(kernel.slots), [of_row(x) for x in sums]
    given = (q, *[k for _ in slots], *[v for _ in slots], planes, keys, *leaves)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(count,),
        in_specs=[
            of_row(q),
            *[of_keys(x, across, slot) for x, across in zip((k, v), view.across, strict=True) for slot in slots],
            of_row(planes),
            pl.BlockSpec((None, keys.shape[1], kernel.tile[1]), lambda i, row, code, _: (row[i], 0, code[i] // COLUMN)),
            *[pl.BlockSpec(x.shape, lambda i, *_: (0, 0, 0)) for x in leaves],
            *carries,
        ],
        out_specs=carries,
    )
    return pl.pallas_call(
        functools.partial(_step, kernel, view, how),
        grid_spec=spec,
        out_shape=[like(x) for x in sums],
        input_output_aliases={3 + len(given) + i: i for i in range(3)},
        interpret=kernel.interpret,
        compiler_params=compiler_params("arbitrary"),
        name="striate_decode",
    )(row, code, pages, *given, *sums)


def _step(kernel: Decode, view: View, how: How, row_ref, code_ref, _, q_ref, *refs):
    k_refs, v_refs, (query_ref, key_ref, *refs) = _cut(refs, kernel.slots, kernel.slots)
    leaf_refs, before, sums = _cut(refs, len(how.ranks), 3)
    m_ref, l_ref, acc_ref = sums
    step, length = pl.program_id(0), key_ref.shape[1] * view.keys
    flags, block = code_ref[step] % COLUMN, code_ref[step] // COLUMN

    @pl.when(flags & FIRST != 0)
    def _():
        for old, new in zip(before, sums, strict=True):
            new[...] = old[...]

    def compute(mask, masked: bool):
        fields = _of_keys(key_ref, how.names, view.keys)

        def logits(rows, keys):
            k = view.load(k_refs, 0, rows.start // how.per_group, keys)
            return product(q_ref[rows], k, NN if view.across[0] else NT)

        def softmax(rows, keys, s):
            width = s.shape[1]
            query = {n: spread(query_ref[i, rows], width) for i, n in enumerate(how.names)}
            key = {n: x[:, keys] for n, x in fields.items()}
            if masked and how.end:
                # Past the end of the cache lies anything, also NaN: a weight of it would stay where p is 0.
                s = jnp.where(jnp.broadcast_to(key[INSIDE], s.shape) == 1, s, 0.0)
            weight = None
            if not how.plain:
                s, weight = scored(_score(how, leaf_refs, rows, width), kernel.scale * s, query, key)
            if mask is not None:
                # Comparisons have the shape of a part then: booleans cannot be spread as integers can.
                query[None], key[None] = jnp.zeros(s.shape, jnp.int32), jnp.zeros((1, width), jnp.int32)
                s = mask.select(query, key, s, -jnp.inf)
            maximum = jnp.maximum(m_ref[rows], s.max(1, keepdims=True))
            decay, lanes = jnp.exp2(m_ref[rows] - maximum), m_ref.shape[1]
            p = jnp.exp2(s - spread(maximum, width))
            l_ref[rows] = l_ref[rows] * decay + sum(p[:, i : i + lanes] for i in range(0, width, lanes))
            m_ref[rows] = maximum
            return (p if weight is None else p * weight).astype(q_ref.dtype), decay

        def gather(rows, keys, p, decay):
            v = view.load(v_refs, 1, rows.start // how.per_group, keys)
            if masked and how.end:
                # And so would a value.
                place = jax.lax.broadcasted_iota(jnp.int32, v.shape, int(view.across[1])) + keys.start
                v = jnp.where(place < how.end - block * length, v, 0)
            added = product(p, v, NT if view.across[1] else NN)
            acc_ref[rows] = acc_ref[rows] * spread(decay, acc_ref.shape[1]) + added

        height, part = how.cut
        cuts = [slice(start, start + part) for start in range(0, length, part)]
        places = [(slice(row, row + height), keys) for keys in cuts for row in range(0, q_ref.shape[0], height)]
        in_turn(places, 1, logits, softmax, gather)

    other_heads = same(HEAD) if HEAD in how.names else None
    shown = kernel.mask if other_heads is None else kernel.mask & other_heads
    pl.when(flags & (LIVE | MASKED) == LIVE)(lambda: compute(other_heads, masked=False))
    pl.when(flags & (LIVE | MASKED) == LIVE | MASKED)(lambda: compute(shown, masked=True))


def _of_keys(ref, names, each: int) -> dict:
    """The fields (1, keys) of a block, whose tokens have `each` keys: the heads 0, 1, .. of a token, then the next."""
    if each == 1:
        return {name: ref[i : i + 1] for i, name in enumerate(names)}
    numbers, pieces = ref[...], []
    for start in range(0, ref.shape[1] * each, LANES):
        key = start + jax.lax.broadcasted_iota(jnp.int32, (len(names), LANES), 1)
        token, first = key // each, start // each // LANES * LANES
        place = (token - first) % LANES
        piece = jnp.take_along_axis(numbers[:, first : first + LANES], place, axis=1)
        if (start + LANES - 1) // each >= first + LANES:
            after = jnp.take_along_axis(numbers[:, first + LANES : first + 2 * LANES], place, axis=1)
            piece = jnp.where(token < first + LANES, piece, after)
        pieces.append(piece)
    numbers = jnp.concatenate(pieces, axis=1)
    head = jax.lax.broadcasted_iota(jnp.int32, (1, numbers.shape[1]), 1) % each
    return {name: head if name == HEAD else numbers[i : i + 1] for i, name in enumerate(names)}


def _score(how: How, refs, rows: slice, width: int):
    """The score of the heads of some rows; its parameters have the shape of their logits."""
    planes = [[spread(ref[i, rows], width) for i in range(ref.shape[0])] for ref in refs]
    return how.tree.unflatten(
        [_Table(tuple(x)) if rank > 1 else x[0] for x, rank in zip(planes, how.ranks, strict=True)]
    )


def _cut(refs, first: int, second: int):
    return refs[:first], refs[first : first + second], refs[first + second :]


def _divisor(length: int, unit: int, longest: int) -> int:
    """The longest part, of at most `longest`, into which a length can be cut: of whole units, where the length is."""
    return max((part for part in range(unit, longest + 1, unit) if length % part == 0), default=length)
