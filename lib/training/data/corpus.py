"""Which files make a corpus, which of them are held out, and the digest that names exactly this text."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

from striate.lib.errors import UserError
from striate.lib.training.data.progress import track

PIECE = 2**24
"""Longer files are cut into documents of this many bytes, so that a row never costs more than reading one piece."""

# Of the salts 1, 2, 3, ... the first by which Pythons 3.11 to 3.13 hold out 270 to 310 kB of their standard library.
_SALT = b"1"

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """Bytes start .. stop of a file, or of a text made here."""

    name: str
    source: Path | bytes
    start: int
    stop: int

    def read(self) -> bytes:
        with _open(self.source) as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


@dataclass(frozen=True)
class Corpus:
    """The text of a folder before it is prepared.

    digest: of all names, sizes, contents and of the split; equal text has an equal digest on every machine.
    files: how many were looked at. skipped: how many of them are unreadable or hold NUL bytes.
    """

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    digest: str
    files: int
    skipped: int


def folder(path: Path, glob: str, held_out: float) -> Corpus:
    """The files of a folder that match `glob`, hidden ones left out.

    Raises:
      UserError: a pattern that pathlib does not read, or no text among the files.
    """
    try:
        found = [file for file in path.glob(glob) if file.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"data.glob={glob!r} is no pattern for files in a folder ({error}); use one like '**/*.txt'."
        ) from error
    names = [(file.relative_to(path).as_posix(), file) for file in found]
    corpus = survey([(name, file) for name, file in names if "/." not in f"/{name}"], held_out)
    if not corpus.train:
        raise UserError(
            f"No text in the folder {path}: {corpus.files} files match data.glob={glob!r}, {corpus.skipped} of them "
            f"are unreadable or binary, the others empty or held out; change data.name, data.glob or data.held_out."
        )
    return corpus


def standard_library(held_out: float) -> Corpus:
    """The sources of the running Python's standard library, and the documentation of its compiled modules.

    Raises:
      UserError: a Python that comes without the sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: list[tuple[str, Path | bytes]] = []
    for parent, folders, names in os.walk(root):
        # config-* and _sysconfigdata* are written by the build of this one interpreter.
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY and not name.startswith("config-")]
        sources = [
            Path(parent, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
        files += [(source.relative_to(root).as_posix(), source) for source in sources]
    if not files:
        raise UserError(
            f"There are no .py files under {root}: this Python comes without sources; give a folder as data.name."
        )
    script = Path(__file__).with_name("documentation.py")
    printed = subprocess.run([sys.executable, "-I", "-S", script], capture_output=True, text=True, check=True).stdout
    # Importing readline may print a terminal code, so only the last line counts.
    for name, text in json.loads(printed.splitlines()[-1]).items():
        files.append((f"documentation/{name}.txt", text.encode()))
    return survey(files, held_out)


def survey(files: list[tuple[str, Path | bytes]], held_out: float) -> Corpus:
    """Reads everything once: what is text, its digest, and its split. Empty files are left out."""
    whole = hashlib.blake2b(repr((held_out, PIECE)).encode(), digest_size=16)
    documents, skipped = [], 0
    for name, source in track(sorted(files, key=lambda file: file[0]), "Looking at the files"):
        fingerprint = _fingerprint(source)
        skipped += fingerprint is None
        if fingerprint:
            size, digest = fingerprint
            whole.update(repr((name, size, digest)).encode())
            documents += [Document(name, source, at, min(at + PIECE, size)) for at in range(0, size, PIECE)]
    train, held = split(documents, held_out)
    return Corpus(tuple(train), tuple(held), whole.hexdigest(), len(files), skipped)


def split(documents: list[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, each in the order of a hash of their names.

    A file's side depends on its own name alone. Only where no name falls on the held-out side (few files, or one) the
    end of the largest document is held out.
    """
    documents = sorted(documents, key=lambda document: (_fraction(document.name), document.name, document.start))
    held = [document for document in documents if _fraction(document.name) < held_out]
    train = documents[len(held) :]
    if held_out and train and not held:
        at = max(range(len(train)), key=lambda i: train[i].stop - train[i].start)
        whole = train[at]
        cut = whole.stop - max(1, int(held_out * (whole.stop - whole.start)))
        train[at], held = replace(whole, stop=cut), [replace(whole, start=cut)]
    return train, held


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), person=_SALT).digest()[:8], "big") / 2**64


def _open(source: Path | bytes):
    return source.open("rb") if isinstance(source, Path) else io.BytesIO(source)


def _fingerprint(source: Path | bytes) -> tuple[int, str] | None:
    """Size and digest of the contents; None for what cannot be read or holds NUL bytes."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    try:
        with _open(source) as file:
            while piece := file.read(PIECE):
                if b"\0" in piece:
                    return None
                digest.update(piece)
                size += len(piece)
    except OSError:
        return None
    return size, digest.hexdigest()
