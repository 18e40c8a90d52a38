"""The TFDS builder that turns files of text into ArrayRecord. Importing this imports TFDS, so it is imported late."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import tensorflow_datasets as tfds

from striate.lib.training.data.corpus import Corpus, Document
from striate.lib.training.data.progress import track


@dataclass(eq=False)
class TextConfig(tfds.core.BuilderConfig):
    """Named by the digest of its corpus: a changed folder is another config, prepared beside the old one."""

    corpus: Corpus | None = field(default=None, repr=False)


class StriateText(tfds.core.GeneratorBasedBuilder):
    """Records {"text", "name"} in the splits "train" and "validation", one for each document, in the corpus's order."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "name": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict:
        corpus = self.builder_config.corpus
        splits = {"train": corpus.train, "validation": corpus.held_out}
        return {name: self._generate_examples(documents) for name, documents in splits.items() if documents}

    def _generate_examples(self, documents: Iterable[Document]):
        for index, document in enumerate(track(documents, "Writing ArrayRecord")):
            yield index, {"text": document.read(), "name": os.fsencode(document.name)}
