"""Masks of published systems: each as text, beside its meaning in plain numpy, and random Tokens to read it on.

The meanings are written from the structure that a paper describes (indices, spans, grids, trees), and read other fields
than the formulas wherever the formulas read derived ones (`end`, `residue`, `chunk_end`, `ring`...).

    for named in papers.MASKS:
        tokens = named.tokens(rng, batch, length)
        named.mask.dense(tokens, tokens) == named.visible(tokens, tokens)      # bool (batch, length, length)

The masks of PER_HEAD tell `named.mask.heads` heads apart, and their `visible` is (batch, heads, length, length).
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from oracles.formulas import as_columns, as_rows
from striate.lib import masks
from striate.lib.tokens import Tokens

Fields = dict[str, np.ndarray]


@dataclass(frozen=True)
class Named:
    """One mask: what a system shows, within documents."""

    name: str
    formula: str
    fields: Callable[[np.random.Generator, np.ndarray], Fields]
    """From the positions 0 .. n - 1 of a document to its further fields, n values or one for all."""
    meaning: Callable[[SimpleNamespace, SimpleNamespace], np.ndarray]
    """From fields (B, T, 1) of queries and (B, 1, S) of keys of the same document; heads are an axis before B."""

    @property
    def text(self) -> str:
        return f"({self.formula}) & same('document')"

    @property
    def mask(self) -> masks.Mask:
        return masks.parse(self.text)

    def tokens(self, rng: np.random.Generator, batch: int, length: int) -> Tokens:
        """Packed documents of any lengths, the last of them padding in some rows; natural order."""
        rows = [self._row(rng, length) for _ in range(batch)]
        return Tokens(**{name: np.stack([row[name] for row in rows]).astype(np.int32) for name in rows[0]})

    def _row(self, rng: np.random.Generator, length: int) -> Fields:
        cuts = np.unique(rng.integers(1, length, size=rng.integers(3)))
        lengths = np.diff(cuts, prepend=0, append=length)
        documents = []
        for number, n in enumerate(lengths):
            position = np.arange(n)
            fields = self.fields(rng, position) | {"position": position, "document": number}
            documents.append({name: np.broadcast_to(value, n) for name, value in fields.items()})
        row = {name: np.concatenate([document[name] for document in documents]) for name in documents[0]}
        if len(lengths) > 1 and rng.random() < 0.5:
            row["document"] = np.where(row["document"] == len(lengths) - 1, -1, row["document"])
        return row

    def visible(self, q_tokens: Tokens, k_tokens: Tokens) -> np.ndarray:
        """bool (B, T, S), or (B, heads, T, S) of a mask that tells heads apart."""
        q, k = SimpleNamespace(**as_columns(q_tokens)), SimpleNamespace(**as_rows(k_tokens))
        visible = (q.document == k.document) & self.meaning(q, k)
        return np.moveaxis(visible, 0, 1) if visible.ndim == 4 else visible


def plain(rng, position) -> Fields:
    return {}


def prefixed(rng, position) -> Fields:
    question = rng.integers(9)
    return {"question": question, "prefix": position < question, "end": np.maximum(position + 1, question)}


def every(n: int, **names: str) -> Callable:
    """Runs of n tokens: their number as the field `run`, the place in them as the field `place`."""

    def fields(rng, position) -> Fields:
        return {names.get("run", "run"): position // n, names.get("place", "place"): position % n}

    return fields


def images(rng, position) -> Fields:
    """Some runs of tokens are images; every token of text is a segment and a frame of its own."""
    n = len(position)
    start, stop = position.copy(), position + 1
    image = np.zeros(n, int)
    for first in range(int(rng.integers(5)), n, 11):
        last = min(n, first + int(rng.integers(2, 7)))
        start[first:last], stop[first:last], image[first:last] = first, last, 1
    turn = np.arange(n) // 13
    kind = np.where(image, 1, rng.integers(0, 2, size=n) * 2)  # text 0, image 1, question 2
    spans = {"start": start, "stop": stop, "segment": start, "frame": start}
    return {**spans, "end": np.maximum(position + 1, stop), "kind": kind, "image": image, "turn": turn}


def inside_the_image(q, k):
    return (q.start <= k.position) & (k.position < q.stop)


def grid(rng, position) -> Fields:
    """A square picture, then text: a ring is what is equally far from the border, the outermost first."""
    side = int(np.sqrt(len(position)))
    row, column = position // side, position % side
    ring = np.minimum.reduce([row, column, side - 1 - row, side - 1 - column])
    text = position >= side * side
    return {"side": side, "row": row, "column": column, "ring": np.where(text, side + position, ring)}


def not_further_in(q, k):
    """A pixel sees all but the square that lies inside its own ring; text sees the picture and the text before it."""
    picture = k.position < k.side**2
    low, high = q.ring, q.side - 1 - q.ring
    inner = (low < k.row) & (k.row < high) & (low < k.column) & (k.column < high)
    q_is_picture = q.position < q.side**2
    return np.where(q_is_picture, picture & ~inner, k.position <= q.position)


def scales(rng, position) -> Fields:
    return {"scale": np.floor(np.log2(position + 1))}


def thoughts(rng, position) -> Fields:
    """Every token once, then some of them again at a greater depth; some slots hold nothing."""
    n = len(position)
    return {"depth": rng.integers(0, 3, size=n), "token": rng.integers(n, size=n), "valid": rng.random(n) < 0.8}


PARENTS = {0: {0}, 1: {0, 1}, 2: {0, 2}, 3: {0, 1, 3}, 4: {2, 4}, 5: {0, 1, 2, 3, 4, 5}}


def nodes(rng, position) -> Fields:
    return {"node": np.sort(rng.integers(-1, 7, size=len(position)))}


def descends(q, k):
    return np.any([(q.node == child) & np.isin(k.node, list(parents)) for child, parents in PARENTS.items()], axis=0)


def lookahead(rng, position) -> Fields:
    look = rng.integers(0, 6, size=len(position))
    return {"look": look, "reach": position + look}


def chunks(rng, position) -> Fields:
    """Chunks of two frames of three tokens."""
    frame, chunk = position // 3, position // 6
    return {"frame": frame, "chunk": chunk, "chunk_end": (chunk + 1) * 2, "visible_chunk": np.maximum(chunk, 2)}


def clean_and_noisy(rng, position) -> Fields:
    """A sequence, and the same again with noise: kind 0 and kind 1."""
    half = (len(position) + 1) // 2
    return {"kind": position >= half, "chunk": position % half // 4, "half": half}


def teacher_forced(q, k):
    """Clean tokens see the clean past and their chunk; noisy ones see the clean chunks before and their own noise."""
    q_index, k_index = q.position % q.half, k.position % k.half
    chunk_start = q_index - q_index % 4
    clean_q, clean_k = q.position < q.half, k.position < k.half
    own = (chunk_start <= k_index) & (k_index < chunk_start + 4)
    before = k_index < chunk_start
    return np.where(clean_q, clean_k & (before | own), np.where(clean_k, before, own))


def long_live(q, k):
    """The latest four frames up to the end of the chunk, and the first two."""
    end = 6 * (q.position // 6 + 1)
    return (k.position < end) & ((k.position >= end - 12) | (k.position < 6))


def groups(rng, position) -> Fields:
    return {"group": np.sort(rng.integers(0, 4, size=len(position)))}


def parallel_parts(rng, position) -> Fields:
    """A question, documents of equal rank, an answer."""
    n = len(position)
    cuts = np.sort(rng.integers(0, n + 1, size=4))
    segment = np.searchsorted(cuts, position, side="right")
    return {"segment": segment, "parallel": (segment > 0) & (segment < 4), "first": cuts[0], "last": cuts[3]}


def order_free(q, k):
    """Documents of equal rank see each other wholly; inside one, and elsewhere, the order counts."""
    q_in, k_in = ((x.first <= x.position) & (x.position < x.last) for x in (q, k))
    return np.where(q_in & k_in & (q.segment != k.segment), True, k.position <= q.position)


def spans(rng, position) -> Fields:
    """Runs of five tokens; a run is context, kind 0, or a span to fill in, kind 1."""
    run = position // 5
    return {"segment": run, "kind": rng.integers(0, 2, size=len(run))[run]}


def video_queries(rng, position) -> Fields:
    """n learned queries over the frames of a video, three tokens a frame."""
    n, frame = len(position), position // 3
    frames = -(-n // 3)
    return {"frame": frame, "frames": frames, "n": n, "query_time": position * frames, "key_time": frame * n}


def motion(rng, position) -> Fields:
    """Times of three levels each, the tokens in any order."""
    time = rng.permutation(len(position))
    level = rng.integers(0, 3, size=len(position))
    return {"time": time, "level": level, "time_level": 3 * time + level}


def lexicographic(q, k):
    return (q.time > k.time) | ((q.time == k.time) & (q.level >= k.level))


def back(q, k):
    return q.position - k.position


def seen(q, k):
    return k.position <= q.position


def _adjacency() -> str:
    return str([[int(parent in PARENTS[child]) for parent in PARENTS] for child in PARENTS])


ROW_ENDS = "difference('end', 'position', 1)"
MMA = "causal() | query('kind', 1, 1) & key('kind', 2, 2) & same('turn')"
MMA_TABLE = "causal() | table('kind', 'kind', [[0, 0, 0], [0, 0, 1], [0, 0, 0]]) & same('turn')"
TEACHER = (
    "query('kind', 0, 0) & key('kind', 0, 0) & at_least('chunk') "
    "| query('kind', 1, 1) & (key('kind', 0, 0) & after('chunk') | key('kind', 1, 1) & same('chunk'))"
)
LONG_LIVE = "difference('chunk_end', 'frame', 1) & (difference('chunk_end', 'frame', None, 4) | key('frame', 0, 1))"


def question_seen_by_images(q, k):
    return seen(q, k) | ((q.kind == 1) & (k.kind == 2) & (q.position // 13 == k.position // 13))


MASKS: tuple[Named, ...] = (
    Named("causal", "causal()", plain, seen),
    Named("bidirectional", "everything()", plain, lambda q, k: np.bool_(True)),
    Named("prefix-LM", "causal() | prefix()", prefixed, lambda q, k: seen(q, k) | (k.position < k.question)),
    Named("prefix-LM, row ends", ROW_ENDS, prefixed, lambda q, k: seen(q, k) | (k.position < k.question)),
    Named("sliding window", "window(5)", plain, lambda q, k: np.isin(back(q, k), range(6))),
    Named("two-sided window", "window(3, right=2)", plain, lambda q, k: np.isin(back(q, k), range(-2, 4))),
    Named(
        "sink and window (StreamingLLM)",
        "window(4) | sink(3)",
        plain,
        lambda q, k: seen(q, k) & ((back(q, k) < 5) | np.isin(k.position, (0, 1, 2))),
    ),
    Named("block causal", "at_least('run')", every(4), lambda q, k: k.position < q.position - q.position % 4 + 4),
    Named(
        "dilated window (Longformer)",
        "window(11) & same('place')",
        every(3),
        lambda q, k: np.isin(back(q, k), (0, 3, 6, 9)),
    ),
    Named(
        "dilated window by modulo",
        "window(11) & modulo('position', 'position', 3)",
        plain,
        lambda q, k: np.isin(back(q, k), (0, 3, 6, 9)),
    ),
    Named(
        "strided (Sparse Transformer)",
        "causal() & (window(4) | modulo('position', 'position', 5))",
        plain,
        lambda q, k: np.isin(back(q, k), (*range(5), *range(0, 10_000, 5))),
    ),
    Named(
        "fixed (Sparse Transformer)",
        "causal() & (same('run') | key('place', 4, 5))",
        every(6),
        lambda q, k: seen(q, k) & ((q.position // 6 == k.position // 6) | np.isin(k.position % 6, (4, 5))),
    ),
    Named(
        "strided, far apart",
        "causal() & (window(1) | modulo('position', 'position', 40))",
        plain,
        lambda q, k: np.isin(back(q, k), (0, 1, *range(0, 10_000, 40))),
    ),
    Named("MAS", "causal() | same('segment')", images, lambda q, k: seen(q, k) | inside_the_image(q, k)),
    Named("MAS, row ends", ROW_ENDS, images, lambda q, k: seen(q, k) | inside_the_image(q, k)),
    Named("modality-mutual (AKI)", MMA, images, question_seen_by_images),
    Named("modality-mutual by table", MMA_TABLE, images, question_seen_by_images),
    Named(
        "to text (DeepSpeed-VisualChat)",
        "causal() & query('image', 0, 0) & key('image', 0, 0)",
        images,
        lambda q, k: seen(q, k) & ~((q.kind == 1) | (k.kind == 1)),
    ),
    Named(
        "to images (DeepSpeed-VisualChat)",
        "query('image', 0, 0) & key('image', 1, 1) & causal() | query('image', 1, 1) & same('segment')",
        images,
        lambda q, k: np.where(q.image == 1, inside_the_image(q, k), seen(q, k) & (k.image == 1)),
    ),
    Named(
        "frame-wise block causal (TC-LLaVA)",
        "causal() | same('frame')",
        images,
        lambda q, k: seen(q, k) | inside_the_image(q, k),
    ),
    Named(
        "causal cross attention (Video-CCAM)",
        "difference('query_time', 'key_time', 0)",
        video_queries,
        lambda q, k: q.position * q.frames // q.n >= k.frame,
    ),
    Named("concentric causal (CCA)", "at_least('ring')", grid, not_further_in),
    Named("scale causal (HieraTok)", "at_least('scale')", scales, lambda q, k: k.position + 1 < 2 ** (q.scale + 1)),
    Named(
        "duo-causal (TaH)",
        "at_least('token') & at_least('depth') & key('valid', 1, 1)",
        thoughts,
        lambda q, k: ~((k.token > q.token) | (k.depth > q.depth) | (k.valid == 0)),
    ),
    Named("DAG transformer", f"table('node', 'node', {_adjacency()})", nodes, descends),
    Named(
        "lookahead per token (ANCAT)",
        "difference('reach', 'position', 0) & window(9, right=None)",
        lookahead,
        lambda q, k: (k.position >= q.position - 9) & (k.position <= q.position + q.look),
    ),
    Named(
        "streaming with a warm start (CarelessWhisper)",
        "difference('visible_chunk', 'chunk', 0)",
        chunks,
        lambda q, k: k.position < np.maximum(q.position // 6 * 6 + 6, 18),
    ),
    Named(
        "temporal layers (ViD-GPT)",
        "same('place') & at_least('run')",
        every(4),
        lambda q, k: np.isin(back(q, k), range(0, 10_000, 4)),
    ),
    Named("spatial layers (ViD-GPT)", "same('run')", every(4), lambda q, k: q.position // 4 == k.position // 4),
    Named("chunk causal (CausVid)", "at_least('chunk')", chunks, lambda q, k: k.position < q.position // 6 * 6 + 6),
    Named(
        "window of frames (Self Forcing)",
        "difference('chunk_end', 'frame', 1, 4)",
        chunks,
        lambda q, k: np.isin(q.position // 6 * 2 + 2 - k.position // 3, (1, 2, 3, 4)),
    ),
    Named("teacher forcing", TEACHER, clean_and_noisy, teacher_forced),
    Named("frame sink and window (LongLive)", LONG_LIVE, chunks, long_live),
    Named("frame causal (FAR)", "at_least('frame')", chunks, lambda q, k: k.position < q.position // 3 * 3 + 3),
    Named(
        "condition groups (EasyControl)",
        "query('group', 0, 0) | same('group')",
        groups,
        lambda q, k: np.where(q.group == 0, True, q.group == k.group),
    ),
    Named(
        "parallel documents (PINE)",
        "causal() | query('parallel', 1, 1) & key('parallel', 1, 1) & ~same('segment')",
        parallel_parts,
        order_free,
    ),
    Named(
        "infilling (MAGNET)",
        "key('kind', 0, 0) | query('kind', 1, 1) & same('segment') & causal()",
        spans,
        lambda q, k: np.where(k.kind == 0, True, seen(q, k) & (q.position // 5 == k.position // 5)),
    ),
    Named("unmasked layer", "switch(True) | causal()", plain, lambda q, k: np.bool_(True)),
    Named("masked layer", "switch(False) | causal()", plain, seen),
    Named(
        "aligned cross attention (FaceFormer)",
        "same('run')",
        every(2),
        lambda q, k: np.isin(k.position - q.position // 2 * 2, (0, 1)),
    ),
    Named("time and level (Mogo)", "at_least('time_level')", motion, lexicographic),
)

PER_HEAD: tuple[Named, ...] = (
    Named(
        "strided in two heads (Sparse Transformer)",
        "causal() & (switch([1, 0]) & window(4) | switch([0, 1]) & modulo('position', 'position', 5))",
        plain,
        lambda q, k: np.stack([np.isin(back(q, k), range(5)), np.isin(back(q, k), range(0, 10_000, 5))]),
    ),
    Named(
        "dilated in two of four heads (Longformer)",
        "window(11) & (modulo('position', 'position', 3) | switch([1, 1, 0, 0])) & (window(3) | switch([0, 0, 1, 1]))",
        plain,
        lambda q, k: np.stack(2 * [np.isin(back(q, k), range(4))] + 2 * [np.isin(back(q, k), range(0, 12, 3))]),
    ),
    Named(
        "one head sees the future",
        "switch([0, 0, 1, 0]) | causal()",
        plain,
        lambda q, k: np.stack([seen(q, k), seen(q, k), np.ones_like(seen(q, k)), seen(q, k)]),
    ),
)
