"""Batches of a prepared folder: pure order, whole coverage, held-out text kept apart; and any TFDS set the same way."""

import dataclasses
import itertools
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from striate.lib.errors import UserError
from striate.lib.layouts import Contiguous, Striped, ZigZag
from striate.lib.text import BOUNDARY, decode
from striate.lib.training import data
from striate.lib.training.data.records import Documents, Records

LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 files of printable bytes, up to 700 in each: documents shorter and longer than a row."""
    root, random = tmp_path_factory.mktemp("folder"), np.random.default_rng(1)
    for index in range(60):
        path = root / f"part{index % 3}" / f"{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(random.integers(32, 127, random.integers(1, 700), np.uint8).tobytes())
    return root


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    return data.DataConfig(
        name=str(folder), length=LENGTH, batch=4, held_out=0.1, data_dir=str(tmp_path_factory.mktemp("prepared"))
    )


@pytest.fixture(scope="module")
def source(config):
    return data.open_source(config)


def equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def epoch_rows(source, epoch=0):
    """int32 (rows per epoch, T + 1): the rows of one epoch, one step at a time."""
    first = epoch * source.rows_per_epoch
    steps = range(first // source.config.batch, -(-(first + source.rows_per_epoch) // source.config.batch))
    batches = [source.batch(step) for step in steps]
    rows = np.concatenate([np.concatenate([b.inputs, b.targets[:, -1:]], axis=1) for b in batches])
    skip = first - steps[0] * source.config.batch
    return rows[skip : skip + source.rows_per_epoch]


def epoch_stream(source, epoch=0):
    """The rows of an epoch joined: neighbours share one id, the last target of the one and first input of the other."""
    rows = epoch_rows(source, epoch)
    np.testing.assert_array_equal(rows[:-1, -1], rows[1:, 0])
    return np.concatenate([rows[:, :-1].ravel(), rows[-1, -1:]])


def training_files(folder, source):
    """The texts of the files that are not held out."""
    held_out = source.held_out_bytes()
    return [text for text in map(Path.read_bytes, folder.rglob("*.txt")) if text not in held_out]


def documents_of(stream):
    """The complete documents in a stream, and the incomplete last one."""
    starts = np.flatnonzero(stream == BOUNDARY)
    pieces = [decode(piece) for piece in np.split(stream, starts) if len(piece)]
    return pieces[:-1], pieces[-1]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_takes_every_training_byte_once_but_for_the_tail(source, folder, epoch):
    stream = epoch_stream(source, epoch)
    complete, cut = documents_of(stream)
    remaining = training_files(folder, source)
    dropped = source.summary["bytes"] + source.summary["documents"] - len(stream)
    assert 0 <= dropped < LENGTH
    for text in complete:
        remaining.remove(text)
    assert any(text.startswith(cut) for text in remaining)
    assert sum(map(len, remaining)) - len(cut) <= dropped


def test_targets_are_the_inputs_one_later(source):
    batch = source.batch(3)
    np.testing.assert_array_equal(batch.targets[:, :-1], batch.inputs[:, 1:])


def test_a_batch_is_a_pure_function_of_seed_and_step(source, config):
    """Whatever was asked for before, and by whichever process: the same arrays."""
    again = data.open_source(config)
    steps = [0, 7, 2 * source.rows_per_epoch, 1]
    forwards = {step: source.batch(step) for step in steps}
    for step in reversed(steps):
        equal(again.batch(step), forwards[step])


def test_the_seed_and_the_epoch_change_the_order(source, config):
    other = data.open_source(dataclasses.replace(config, seed=1))
    streams = [epoch_stream(source, 0), epoch_stream(source, 1), epoch_stream(other, 0)]
    for ours, theirs in itertools.combinations(streams, 2):
        assert len(ours) == len(theirs) and (ours != theirs).any()


def test_a_batch_may_lie_in_two_epochs(source):
    last = source.rows_per_epoch // source.config.batch
    split = source.rows_per_epoch - last * source.config.batch
    assert 0 < split < source.config.batch, "the folder of this test no longer ends an epoch inside a batch"
    batch = source.batch(last)
    np.testing.assert_array_equal(batch.inputs[split - 1], epoch_rows(source, 0)[-1, :-1])
    np.testing.assert_array_equal(batch.inputs[split], epoch_rows(source, 1)[0, :-1])


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 4), slice(1, None, 2), slice(3, 4)])
def test_a_host_makes_its_own_rows_only(source, rows):
    equal(source.batch(5, rows=rows), jax.tree.map(lambda x: x[rows], source.batch(5)))
    for mine, whole in zip(source.held_out(rows=rows), source.held_out(), strict=True):
        equal(mine, jax.tree.map(lambda x: x[rows], whole))


@pytest.mark.parametrize("layout", [Striped(4, 2), Striped(8), ZigZag(4), Contiguous(8)], ids=str)
def test_a_layout_permutes_every_array_and_restores_to_the_natural_batch(config, layout):
    source = data.open_source(dataclasses.replace(config, ngram_orders=(2, 3)))
    batch, natural = source.batch(2, layout), source.batch(2)
    order = layout.order(LENGTH)
    equal(batch, jax.tree.map(lambda x: x[:, order], natural))
    equal(layout.restore(batch), natural)
    equal(list(map(layout.restore, source.held_out(layout))), list(source.held_out()))


def test_a_length_that_the_layout_cannot_lay_out_is_refused(source):
    with pytest.raises(UserError, match="multiple of 48"):
        source.batch(0, Striped(3, 16))


def test_the_held_out_text_is_taken_once_and_padded(source):
    batches = list(source.held_out())
    assert {batch.inputs.shape for batch in batches} == {(4, LENGTH)}
    real = np.concatenate([batch.weights.ravel() for batch in batches]) == 1
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    assert decode(targets[real]) == source.held_out_bytes()
    assert real.sum() == len(source.held_out_bytes()) + source.summary["held-out documents"] - 1
    padding = np.concatenate([batch.tokens.document.ravel() for batch in batches]) == -1
    np.testing.assert_array_equal(padding, ~real)
    assert padding.any() and not padding[: real.sum()].any()


def test_the_held_out_split_is_some_whole_files_and_the_other_files_train(source, folder):
    training, files = training_files(folder, source), list(folder.rglob("*.txt"))
    assert 1 <= len(files) - len(training) <= 15
    assert len(files) - len(training) == source.summary["held-out documents"]
    assert sum(map(len, training)) == source.summary["bytes"]
    assert sum(path.stat().st_size for path in files) == source.summary["bytes"] + source.summary["held-out bytes"]
    complete, _ = documents_of(epoch_stream(source))
    assert set(complete) < set(training)


def test_the_held_out_cap_counts_for_the_batches_and_for_the_bytes(source, config):
    capped = data.open_source(dataclasses.replace(config, held_out_cap=300))
    assert capped.held_out_bytes() == source.held_out_bytes()[:300]
    taken = np.concatenate([batch.targets[batch.weights == 1] for batch in capped.held_out()])
    assert decode(taken) == capped.held_out_bytes()


def test_editing_a_held_out_file_changes_no_training_batch(folder, config, tmp_path):
    root = tmp_path / "copy"
    for path in folder.rglob("*.txt"):
        copy = root / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    config = dataclasses.replace(config, name=str(root), data_dir=str(tmp_path))
    before = data.open_source(config)
    held = next(path for path in root.rglob("*.txt") if path.read_bytes() in before.held_out_bytes())
    held.write_bytes(b"a very different text")
    after = data.open_source(config)
    assert after.held_out_bytes() != before.held_out_bytes()
    equal([after.batch(step) for step in range(10)], [before.batch(step) for step in range(10)])
    # The negative control: a training file does change it.
    trained = next(path for path in root.rglob("*.txt") if path.read_bytes() not in after.held_out_bytes())
    trained.write_bytes(trained.read_bytes().swapcase())
    edited = data.open_source(config)
    assert (epoch_stream(edited) != epoch_stream(after)).any()


def test_a_corpus_too_large_to_keep_gives_the_same_batches(source, config, monkeypatch):
    steps = range(0, source.rows_per_epoch, 5)  # four epochs
    expected = [source.batch(step) for step in steps]
    monkeypatch.setattr(Documents, "MEMORY", 0)
    monkeypatch.setattr(Documents, "RECENT", 2)
    read, text = [], Records.text
    monkeypatch.setattr(Records, "text", lambda self, index: read.append(index) or text(self, index))
    large = data.open_source(config)
    read.clear()
    equal([large.batch(step) for step in steps], expected)
    assert len(read) > len(set(read)), "nothing was read twice, so this did not test what it says"


def test_an_unchanged_folder_is_not_prepared_again(source, config):
    prepared = source.summary["prepared in"]
    before = {path: path.stat().st_mtime_ns for path in Path(prepared).iterdir()}
    again = data.open_source(config)
    assert again.summary == source.summary
    assert before == {path: path.stat().st_mtime_ns for path in Path(prepared).iterdir()}


def test_the_prefetching_iterator_gives_the_batches_in_turn(source):
    for ahead in (1, 3):
        equal(list(source.batches(4, 9, ahead=ahead)), [source.batch(step) for step in range(4, 9)])
    assert list(source.batches(3, 3)) == []


def test_the_prefetching_iterator_works_ahead_in_a_thread_and_ends_with_it(source, monkeypatch):
    made, batch = [], source.batch
    third = threading.Event()

    def watched(step, *rest):
        made.append((step, threading.current_thread()))
        if step == 2:
            third.set()
        return batch(step, *rest)

    monkeypatch.setattr(source, "batch", watched)
    batches = source.batches(0, 1000)
    next(batches)
    assert third.wait(10), "nothing was made ahead of the first batch"
    thread = made[0][1]
    assert thread is not threading.current_thread()
    batches.close()
    assert not thread.is_alive()
    assert [step for step, _ in made] == [0, 1, 2]


def test_the_prefetching_iterator_passes_errors_on_at_their_step(source, monkeypatch):
    batch = source.batch

    def failing(step, *rest):
        if step == 2:
            raise OSError("the disk is gone")
        return batch(step, *rest)

    monkeypatch.setattr(source, "batch", failing)
    batches = source.batches(0, 5)
    equal([next(batches), next(batches)], [batch(0), batch(1)])
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
