"""What to train on, and how it is cut into rows."""

from __future__ import annotations

from dataclasses import dataclass

from striate.lib.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """The corpus, the rows cut from it, and what is kept for evaluation."""

    name: str = "stdlib"
    """"stdlib" (the standard library of the running Python), a folder of text, or a TFDS name such as "lm1b"."""
    length: int = 4096
    """Tokens per row: the context."""
    batch: int = 2
    """Rows per step, over the whole job."""
    seed: int = 0
    """Seed of the order of the documents."""
    held_out: float = 0.02
    """Share of the files (by a hash of their path) that is held out, where the set has no split of its own."""
    held_out_cap: int = 2**19
    """Most bytes of the held-out split that are used."""
    data_dir: str = "~/.cache/striate"
    """Where the ArrayRecord files are prepared."""
    text_key: str = "text"
    """The feature of a TFDS set that holds the text."""
    glob: str = "**/*"
    """Which files of a folder are read."""
    ngram_orders: tuple[int, ...] = ()
    """Lengths of the hashed n-grams handed to the model, such as (2, 3, 4)."""
    ngram_buckets: int = 16384
    """Ids that the n-grams of one length are hashed to."""


def check(config: DataConfig) -> None:
    """Raises UserError for the first field whose value cannot work."""
    for field, works, need in (
        ("length", config.length >= 1, "at least 1"),
        ("batch", config.batch >= 1, "at least 1"),
        ("seed", 0 <= config.seed < 2**64, "between 0 and 2**64 - 1"),
        ("held_out", 0 <= config.held_out < 1, "at least 0 and less than 1"),
        ("held_out_cap", config.held_out_cap >= 0, "at least 0"),
        ("ngram_orders", all(n >= 1 for n in config.ngram_orders), "lengths of at least 1, or empty"),
        ("ngram_buckets", 1 <= config.ngram_buckets < 2**31, "between 1 and 2**31 - 1"),
    ):
        if not works:
            raise UserError(f"data.{field} is {getattr(config, field)!r}; it has to be {need}.")
