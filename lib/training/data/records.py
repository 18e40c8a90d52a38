"""Prepared sets: found or made through TFDS as ArrayRecord, opened for random access to the text of their records.

TFDS is imported inside the functions: it takes a while, and nothing needs it before a set is opened.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import io
import logging
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from striate.lib.errors import UserError
from striate.lib.training.data import corpus
from striate.lib.training.data.config import DataConfig
from striate.lib.training.data.progress import track, waiting

# TFDS looks for a name in all of its packages in turn, and stops looking at the first whose imports are missing.
_PACKAGES_WITH_TEXT = ("text", "question_answering", "summarization", "text_simplification", "translate")


def prepare(config: DataConfig):
    """The TFDS builder of the set, prepared as ArrayRecord if it was not yet.

    Raises:
      UserError: no such folder or TFDS name, no text in it, or TFDS cannot prepare it.
    """
    path, data_dir = Path(config.name).expanduser(), str(Path(config.data_dir).expanduser())
    if config.name == "stdlib":
        return _from_corpus(corpus.standard_library(config.held_out), data_dir)
    if config.name and path.is_dir():
        return _from_corpus(corpus.folder(path, config.glob, config.held_out), data_dir)
    if path.is_file():
        raise UserError(
            f"data.name={config.name!r} is a file; give its folder, data.name={str(path.parent)!r}, and "
            f"data.glob={path.name!r}."
        )
    return _from_tfds(config.name, data_dir)


def _from_corpus(text: corpus.Corpus, data_dir: str):
    from striate.lib.training.data.builder import StriateText, TextConfig

    with _quiet():
        made = StriateText(config=TextConfig(name=text.digest, corpus=text), data_dir=data_dir)
        try:
            _download_and_prepare(made)
        except OSError as error:
            # Another process may have finished the same set a moment earlier, under the same name.
            made = StriateText(config=TextConfig(name=text.digest, corpus=text), data_dir=data_dir)
            if not made.is_prepared():
                raise UserError(f"data.data_dir={data_dir!r} cannot hold the text ({error}): give another.") from error
        return made


def _from_tfds(name: str, data_dir: str):
    import tensorflow_datasets as tfds

    for package in _PACKAGES_WITH_TEXT:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"tensorflow_datasets.{package}")
    with _quiet():
        try:
            made = tfds.builder(name, data_dir=data_dir)
        except (ValueError, AssertionError, ImportError) as error:  # unknown names, versions, and namespaces
            raise UserError(_unknown(name, error)) from error
        try:
            with waiting(f"TFDS downloads and prepares {made.info.full_name} in {data_dir}"):
                _download_and_prepare(made)
        except Exception as error:  # whatever the set's own script, its download or its requirements raise
            why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise UserError(
                f"TFDS could not prepare {name!r} in {data_dir} ({why}); prepare it elsewhere with "
                f"file_format='array_record' and give that data.data_dir, or give a folder of text as data.name."
            ) from error
    return made


def _unknown(name: str, error: Exception) -> str:
    import tensorflow_datasets as tfds

    if name.startswith(("/", ".", "~")) or "\\" in name:
        return f"The folder data.name={name!r} does not exist: correct the path, or give the name of a TFDS set."
    known = tfds.list_builders(with_community_datasets=False)
    base = name.partition("/")[0].partition(":")[0]
    if base in known:
        return f"TFDS has {base!r}, but not {name!r}: {' '.join(str(error).split())}"
    near = difflib.get_close_matches(base, known, n=3, cutoff=0.4)
    return (
        f"data.name={name!r} is neither 'stdlib', nor a folder here, nor one of the {len(known)} TFDS sets "
        f"(nearest: {', '.join(near) or 'none'}): correct it, or give the path of a folder of text."
    )


def _download_and_prepare(made) -> None:
    import tensorflow_datasets as tfds

    # The copies on GCS are TFRecord, and looking for them takes a network.
    settings = tfds.download.DownloadConfig(try_download_gcs=False)
    made.download_and_prepare(file_format="array_record", download_config=settings)


@contextlib.contextmanager
def _quiet():
    """Keeps TFDS's bars, banners and warnings off the terminal."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.setLevel(level)


class Documents:
    """Random access to the text of some records of a prepared split; what was read is kept while it is small.

    lengths: int64 (documents,), the bytes of each.
    """

    MEMORY, RECENT = 2**28, 64  # bytes of text that are kept as a whole; documents kept of a larger one

    def __init__(self, records: Records, indices: np.ndarray):
        self.lengths = records.lengths()[indices]
        # A row takes a run of documents, and the next row starts in the last of them.
        kept = None if self.lengths.sum() < self.MEMORY else self.RECENT
        self.read = functools.lru_cache(kept)(lambda document: records.text(int(indices[document])))


class Records:
    """The text of all records of one split of a prepared set.

    Raises:
      UserError: no string feature `text_key`, or files that were prepared in a format without random access.
    """

    def __init__(self, made, split: str, text_key: str):
        strings = [key for key, kind in made.info.features.items() if kind.shape == () and kind.np_dtype == np.object_]
        if text_key not in strings:
            raise UserError(
                f"{made.info.full_name} has no text feature data.text_key={text_key!r}: "
                f"it has {', '.join(strings) or 'none'}; give one of them."
            )
        self.key, self.cache = text_key, made.data_path / f"lengths-{split}-{text_key}.npy"
        try:
            self.source = made.as_data_source(split)
        except NotImplementedError as error:
            raise UserError(
                f"{made.info.full_name} is prepared in {made.data_dir} as {made.info.file_format.value}, which has no "
                f"random access; give another data.data_dir, and it is prepared there as array_record."
            ) from error

    def __len__(self) -> int:
        return len(self.source)

    def text(self, index: int) -> bytes:
        return self.source[index][self.key]

    def lengths(self) -> np.ndarray:
        """int64 (records,): bytes of each, counted once and kept beside the records."""
        if self.cache.exists():
            return np.load(io.BytesIO(self.cache.read_bytes()))
        everyone = track(range(len(self)), "Measuring the documents")
        lengths = np.fromiter((len(self.text(index)) for index in everyone), np.int64, len(self))
        buffer = io.BytesIO()
        np.save(buffer, lengths)
        unfinished = self.cache.with_name(f"{self.cache.name}.{uuid.uuid4().hex}")
        # A prepared set may lie on a read-only disk.
        with contextlib.suppress(OSError):
            unfinished.write_bytes(buffer.getvalue())
            unfinished.replace(self.cache)
        return lengths

    def first(self, indices: Iterable[int], most: int) -> list[bytes]:
        """The texts of the given records, up to `most` bytes in all."""
        texts = []
        for index in indices:
            if most <= 0:
                break
            texts.append(self.text(int(index))[:most])
            most -= len(texts[-1])
        return texts
