"""Text as batches: any folder, any TFDS set, or Python's own standard library.

TFDS prepares it as ArrayRecord and reads it, without TensorFlow. The order is a pure function of (seed, step), so that
there is no iterator whose state would have to be saved.
"""

from striate.lib.ngrams import ngram_ids
from striate.lib.text import BOUNDARY, VOCABULARY, decode, encode
from striate.lib.training.data.config import DataConfig
from striate.lib.training.data.packing import Batch
from striate.lib.training.data.source import Source, open_source

__all__ = ["BOUNDARY", "VOCABULARY", "Batch", "DataConfig", "Source", "decode", "encode", "ngram_ids", "open_source"]
