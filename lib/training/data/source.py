"""The source of batches: which row of which epoch a step takes is a pure function of (seed, step)."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from striate.lib.errors import UserError
from striate.lib.layouts import Layout
from striate.lib.training.data import records
from striate.lib.training.data.config import DataConfig, check
from striate.lib.training.data.packing import Batch, Stream, pack

_SPLIT = 2**64 - 1  # the word of the generator's key that splits a set, which no epoch reaches


def open_source(config: DataConfig) -> Source:
    """Opens the corpus of `config`, and prepares it first where this was not done yet.

    Raises:
      UserError: a field that cannot work, an unknown set, no text, or too little of it for one row.
    """
    check(config)
    made = records.prepare(config)
    splits = {name: split.num_examples for name, split in made.info.splits.items() if split.num_examples}
    if "train" not in splits:
        raise UserError(
            f"{made.info.full_name} has no split 'train', only {', '.join(splits) or 'none'}: give another set."
        )
    everything = records.Records(made, "train", config.text_key)
    own = next((name for name in ("validation", "test") if name in splits), None)
    if own:
        held = records.Records(made, own, config.text_key)
        train, texts = np.arange(len(everything)), held.first(range(len(held)), config.held_out_cap)
    else:
        train, indices = _split(len(everything), config.held_out)
        texts = everything.first(indices, config.held_out_cap)
    text = getattr(made.builder_config, "corpus", None)
    origin = {"files": text.files, "skipped files": text.skipped} if text else {}
    return Source(config, records.Documents(everything, train), texts, {**origin, "prepared in": str(made.data_dir)})


def _split(documents: int, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) indices by a hash of the index: of two documents or more, at least one is held out."""
    draw = _random(_SPLIT, _SPLIT, documents) / 2.0**64
    held = draw < held_out
    if held_out and documents > 1:
        held[draw.argmin()] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _random(seed: int, counter: int, count: int) -> np.ndarray:
    """uint64 (count,), a pure function of its arguments in every version of NumPy (only the raw words are promised)."""
    return np.random.Philox(key=np.array([seed, counter], np.uint64)).random_raw(count)


class Source:
    """Batches of one corpus. Made by `open_source`.

    An epoch shuffles the documents and lays them end to end, each led by BOUNDARY; its row i takes ids [i T, (i + 1) T]
    of that stream, the last of them as a target only. So every id is a target once an epoch, except the first one and
    the tail that fills no row. Step s takes rows s B .. (s + 1) B - 1, counted on through all epochs.
    """

    def __init__(self, config: DataConfig, train: records.Documents, held_out: list[bytes], origin: dict):
        self.config, self._train, self._held_out_texts, self._origin = config, train, held_out, origin
        lengths = np.array([len(text) for text in held_out], np.int64)
        self._held_out = Stream(held_out.__getitem__, lengths, np.arange(len(held_out)))
        tokens = int(train.lengths.sum()) + len(train.lengths)
        self.rows_per_epoch = (tokens - 1) // config.length
        if self.rows_per_epoch < 1:
            raise UserError(
                f"The training text of {config.name!r} is {tokens} tokens in {len(train.lengths)} documents; one row "
                f"of data.length={config.length} takes {config.length + 1}: give more text or a smaller data.length."
            )
        self._epoch = functools.lru_cache(2)(self._shuffled)  # a batch may lie in two epochs

    def _shuffled(self, epoch: int) -> Stream:
        words = _random(self.config.seed, epoch, len(self._train.lengths))
        return Stream(self._train.read, self._train.lengths, np.argsort(words, kind="stable"))

    def batch(self, step: int, layout: Layout | None = None, rows: slice = slice(None)) -> Batch:
        """The batch of a step, a pure function of (config.seed, step).

        Args:
          step: 0, 1, 2, ...
          layout: the order of the tokens in each row; None is the natural one. The targets are shifted before.
          rows: which of the `config.batch` rows to make, for a host that feeds only some of them.

        Raises:
          UserError: a length that the layout cannot lay out.
        """
        first = int(step) * self.config.batch
        places = [divmod(row, self.rows_per_epoch) for row in range(first, first + self.config.batch)[rows]]
        return self._pack([self._row(self._epoch(epoch), row) for epoch, row in places], layout)

    def batches(
        self, start: int, stop: int, layout: Layout | None = None, rows: slice = slice(None), ahead: int = 2
    ) -> Iterator[Batch]:
        """The batches of steps start .. stop - 1 in turn, the next `ahead` of them made by a thread meanwhile."""
        with ThreadPoolExecutor(1, thread_name_prefix="striate-data") as thread:
            try:
                waiting = deque()
                for step in range(start, stop):
                    waiting.append(thread.submit(self.batch, step, layout, rows))
                    if len(waiting) > ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                thread.shutdown(cancel_futures=True)

    def held_out(self, layout: Layout | None = None, rows: slice = slice(None)) -> Iterator[Batch]:
        """Batches that take the held-out text once, in order; what the last one lacks is padding of weight 0."""
        count = -(-(len(self._held_out) - 1) // self.config.length)
        for first in range(0, count, self.config.batch):
            places = range(first, first + self.config.batch)[rows]
            yield self._pack([self._row(self._held_out, row) for row in places], layout)

    def held_out_bytes(self) -> bytes:
        """The text that `held_out` takes, its documents end to end."""
        return b"".join(self._held_out_texts)

    @property
    def summary(self) -> dict[str, int | str]:
        """What was opened, for the report."""
        return {
            "name": self.config.name,
            "documents": len(self._train.lengths),
            "bytes": int(self._train.lengths.sum()),
            "rows per epoch": self.rows_per_epoch,
            "held-out documents": len(self._held_out_texts),
            "held-out bytes": len(self.held_out_bytes()),
            **self._origin,
        }

    def _row(self, stream: Stream, row: int) -> np.ndarray:
        return stream.cut(row * self.config.length, (row + 1) * self.config.length + 1)

    def _pack(self, ids: list[np.ndarray], layout: Layout | None) -> Batch:
        ids = np.array(ids, np.int32).reshape(-1, self.config.length + 1)
        batch = pack(ids, self.config.ngram_orders, self.config.ngram_buckets)
        return batch if layout is None else layout.permute(batch)
