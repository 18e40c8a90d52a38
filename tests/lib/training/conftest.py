"""A run small enough to be started many times: two layers, rows of 256 tokens over eight devices, made-up text."""

import dataclasses

import numpy as np
import pytest

from striate.configs.schema import Experiment
from striate.lib.training import data, loop, optimiser, partition
from striate.models.decoder import DecoderConfig

WORDS = ("def", "return", "for", "in", "if", "else", "lambda", "yield", "x", "y", "(", ")", ":", "\n", "    ")


@pytest.fixture(scope="session")
def text_data(tmp_path_factory):
    """The DataConfig of 200 seeded files of about 180 bytes, prepared once."""
    folder, random = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for index in range(200):
        (folder / f"{index}.txt").write_text(" ".join(random.choice(WORDS, 60)))
    prepared = str(tmp_path_factory.mktemp("prepared"))
    config = data.DataConfig(name=str(folder), length=256, batch=2, held_out=0.1, held_out_cap=3000, data_dir=prepared)
    data.open_source(config)
    return config


@pytest.fixture(scope="session")
def tiny(text_data):
    """A run of 12 steps, checkpointed every other step, over eight devices."""
    run = {"eval_every": 4, "eval_batches": 2, "checkpoint_every": 2, "log_every": 4, "sample_length": 0}
    return Experiment(
        model=DecoderConfig(width=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=64),
        data=text_data,
        optimiser=optimiser.OptimiserConfig(warmup=3),
        mesh=partition.MeshConfig(sequence=8, stripe=16),
        run=loop.RunConfig(name="tiny", steps=12, **run),
    )


@pytest.fixture
def experiment(tiny, change, tmp_path):
    """The tiny run, in a directory of this test."""
    return change(tiny, "run.directory", str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def change():
    """change(experiment, "run.steps", 3): a copy with one field set."""

    def set_field(config, path, value):
        name, _, rest = path.partition(".")
        return dataclasses.replace(config, **{name: set_field(getattr(config, name), rest, value) if rest else value})

    return set_field
