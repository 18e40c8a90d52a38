"""What a model has learnt: the held-out loss, by position too, beside what a general compressor makes of the text."""

from __future__ import annotations

import itertools
import lzma
import math
from typing import NamedTuple

import numpy as np

from striate.lib.errors import UserError
from striate.lib.text import BOUNDARY
from striate.lib.training import data, partition
from striate.lib.training.step import Program


class Evaluation(NamedTuple):
    """The loss on held-out text."""

    bits_per_byte: float
    """All the loss, in bits, over the bytes among the targets: the size of the text, compressed by the model."""
    bits_by_position: np.ndarray
    """float64 (T,), mean bits of the tokens that so many tokens of their document precede in the row; NaN for none."""


def held_out_loss(program: Program, params, source: data.Source, layout, batches: int | None = None) -> Evaluation:
    """Evaluates parameters on the held-out text, or on its first `batches` batches.

    The sums are taken on the host in float64, in the order of the text.

    Raises:
      UserError: there is no held-out text.
    """
    length = source.config.length
    bits, count, bytes_seen = np.zeros(length), np.zeros(length), 0
    for batch in itertools.islice(source.held_out(layout), batches):
        nll = np.asarray(program.evaluate(params, partition.put(batch, program.mesh)), np.float64)
        counted = batch.weights > 0
        position = np.asarray(batch.tokens.position)[counted]
        np.add.at(bits, position, nll[counted] / math.log(2.0))
        np.add.at(count, position, 1)
        bytes_seen += int((batch.targets[counted] < BOUNDARY).sum())
    if not bytes_seen:
        raise UserError("There is no held-out text to evaluate on: set --data.held-out higher, or add documents.")
    by_position = np.divide(bits, count, out=np.full(length, np.nan), where=count > 0)
    return Evaluation(float(bits.sum()) / bytes_seen, by_position)


def xz_bits_per_byte(text: bytes) -> float:
    """What xz -9 makes of a text: bits of the compressed stream per byte."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
