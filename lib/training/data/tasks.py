"""Tasks: small made-up sequences, each of which takes one ability to solve.

A task is a frozen dataclass of sizes. Its `sample(key)` is pure, with fixed shapes, to be mapped over keys; its
`oracle(inputs)` finds the targets again, in numpy, and shares no code with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Row(NamedTuple):
    """One sequence. A target is what its own slot has to answer, no shift anywhere."""

    inputs: jax.Array  # int32 (T,)
    targets: jax.Array  # int32 (T,)
    weights: jax.Array  # float32 (T,): 1 where the slot is scored, else 0


@dataclass(frozen=True)
class Recall:
    """Pairs of a key and a value, then keys alone: each is answered by its value. Keys are distinct.

    Source: Arora et al. 2024 (Zoology), section 3, multi-query associative recall.
    """

    pairs: int = 12
    queries: int = 8
    keys: int = 16
    values: int = 16
    gap: int = 0
    """Slots of filler between the pairs and the queries."""

    @property
    def vocabulary(self) -> int:
        return self.keys + self.values + (self.gap > 0)

    @property
    def length(self) -> int:
        return self.asked_from + self.queries

    @property
    def asked_from(self) -> int:
        """The slot of the first query."""
        return 2 * self.pairs + self.gap

    def sample(self, key) -> Row:
        of_keys, of_values, of_queries = jax.random.split(key, 3)
        keys = self._keys(of_keys)
        values = self.keys + jax.random.randint(of_values, (self.pairs,), 0, self.values)
        asked = keys[jax.random.randint(of_queries, (self.queries,), 0, self.pairs)]
        last = jnp.where(keys[None] == asked[:, None], jnp.arange(self.pairs)[None], -1).max(1)
        filler = jnp.full(self.gap, self.keys + self.values)
        inputs = jnp.concatenate([jnp.stack([keys, values], axis=1).reshape(-1), filler, asked])
        scored = jnp.arange(self.length) >= self.asked_from
        targets = jnp.concatenate([jnp.zeros(self.asked_from, jnp.int32), values[last]])
        return Row(inputs, targets, scored.astype(jnp.float32))

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """Targets of the scored slots of one row."""
        facts, asked = inputs[: 2 * self.pairs].reshape(-1, 2), inputs[self.asked_from :]
        known = {int(key): int(value) for key, value in facts}
        return np.array([known[int(key)] for key in asked])

    def _keys(self, key):
        return jax.random.permutation(key, self.keys)[: self.pairs]


@dataclass(frozen=True)
class Overwrite(Recall):
    """Recall in which keys come again, and the latest value is the right one."""

    pairs: int = 24

    def _keys(self, key):
        return jax.random.randint(key, (self.pairs,), 0, self.keys)


@dataclass(frozen=True)
class NearestMarker:
    """Markers among blanks, 0: a slot is answered by the nearest marker at it or after it, where there is one."""

    length: int = 32
    vocabulary: int = 4
    share: float = 0.25
    """Of slots that are markers."""

    def sample(self, key) -> Row:
        of_places, of_markers = jax.random.split(key)
        there = jax.random.bernoulli(of_places, self.share, (self.length,))
        inputs = jnp.where(there, jax.random.randint(of_markers, (self.length,), 1, self.vocabulary), 0)
        nearest = jax.lax.cummin(jnp.where(there, jnp.arange(self.length), self.length - 1), reverse=True)
        targets = inputs[nearest]
        return Row(inputs, targets, (targets > 0).astype(jnp.float32))

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """Targets of the scored slots of one row."""
        return np.array([inputs[t:][inputs[t:] > 0][0] for t in range(len(inputs)) if inputs[t:].any()])


@dataclass(frozen=True)
class Topic:
    """A row begins with some copies of its topic, then there is noise, and the last slot asks what the topic was."""

    length: int = 512
    copies: int = 4
    topics: int = 8
    noise: int = 8

    @property
    def vocabulary(self) -> int:
        return self.topics + self.noise + 1

    def sample(self, key) -> Row:
        of_topic, of_noise = jax.random.split(key)
        topic = jax.random.randint(of_topic, (), 0, self.topics)
        noise = jax.random.randint(of_noise, (self.length,), self.topics, self.topics + self.noise)
        last = jnp.arange(self.length) == self.length - 1
        inputs = jnp.where(jnp.arange(self.length) < self.copies, topic, noise)
        inputs = jnp.where(last, self.vocabulary - 1, inputs)
        return Row(inputs, jnp.where(last, topic, 0), last.astype(jnp.float32))

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """Targets of the scored slots of one row."""
        return inputs[:1]
