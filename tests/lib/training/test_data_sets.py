"""What can be opened: the standard library, folders, TFDS names; and the answer to all that cannot be."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from striate.lib.errors import UserError
from striate.lib.training import data
from striate.lib.training.data import corpus


def write(root, **files):
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def open_folder(tmp_path, **fields):
    fields = {"name": str(tmp_path / "text"), "length": 8, "batch": 1, "data_dir": str(tmp_path / "prepared"), **fields}
    return data.open_source(data.DataConfig(**fields))


def training_text(source):
    """The training text of one epoch but for the tail that fills no row; the source has one row per step."""
    return data.decode([source.batch(step).inputs for step in range(source.rows_per_epoch)])


# The default corpus


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return data.open_source(data.DataConfig(data_dir=str(tmp_path_factory.mktemp("prepared"))))


@pytest.mark.smoke
def test_the_standard_library_is_a_corpus_of_its_sources_and_documentation(library):
    summary = library.summary
    assert 9e6 < summary["bytes"] < 16e6 and 500 < summary["documents"] < 1000
    assert 200e3 < summary["held-out bytes"] < 400e3, "the held-out share of 0.02 is far off"
    batch = library.batch(0)
    assert batch.inputs.shape == (2, 4096)
    assert set(np.unique(batch.inputs)) <= set(range(257))


def test_the_standard_library_holds_no_tests_packages_or_traces_of_this_machine():
    text = corpus.standard_library(0.02)
    names = {document.name for document in text.train + text.held_out}
    assert {"ast.py", "json/decoder.py", "documentation/builtins.txt", "documentation/math.txt"} <= names
    assert not [
        name for name in names if {"test", "tests", "site-packages"} & set(name.split("/")) or "_sysconfigdata" in name
    ]
    documented = next(document for document in text.train + text.held_out if document.name == "documentation/math.txt")
    assert b"math.sqrt" in documented.read() and b"Return the square root of x." in documented.read()
    assert corpus.standard_library(0.02).digest == text.digest
    assert sysconfig.get_path("stdlib").encode() not in documented.read()


@pytest.mark.smoke
def test_opening_is_quiet_and_never_imports_tensorflow(tmp_path):
    """In a process of its own: the import prints nothing and loads no TFDS; opening loads TFDS but not TensorFlow."""
    write(tmp_path / "text", a=b"some text " * 20, b=b"more text " * 20)
    write(tmp_path / "path", **{"tensorflow.py": b""})  # one that could be imported, installed or not
    path = os.pathsep.join([str(tmp_path / "path"), *filter(None, [os.environ.get("PYTHONPATH")])])
    script = (
        "import sys; from striate.lib.training import data; assert 'tensorflow_datasets' not in sys.modules\n"
        f"source = data.open_source(data.DataConfig({str(tmp_path / 'text')!r}, 8, data_dir={str(tmp_path)!r}))\n"
        "source.batch(0); list(source.held_out())\n"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Folders


def test_binary_files_are_skipped_and_counted(tmp_path):
    write(tmp_path / "text", a=b"text a " * 9, image=b"\x89PNG\0\0", latin=b"caf\xe9 " * 9, empty=b"")
    source = open_folder(tmp_path, held_out=0.0)
    assert source.summary["files"] == 4 and source.summary["skipped files"] == 1
    assert source.summary["documents"] == 2
    assert b"caf\xe9" in training_text(source)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails, also for root")
def test_unreadable_files_are_skipped_and_counted(tmp_path):
    (write(tmp_path / "text", a=b"text a " * 9) / "memory").symlink_to("/proc/self/mem")
    source = open_folder(tmp_path, held_out=0.0)
    assert source.summary["files"] == 2 and source.summary["skipped files"] == 1


def test_hidden_files_and_files_outside_the_pattern_are_left_out(tmp_path):
    write(
        tmp_path / "text", **{"a.txt": b"a" * 50, "sub__b.txt": b"b" * 50, "c.md": b"c" * 50, ".git__d.txt": b"d" * 50}
    )
    source = open_folder(tmp_path, glob="**/*.txt", held_out=0.0)
    assert source.summary["files"] == 2 and source.summary["bytes"] == 100
    assert open_folder(tmp_path, held_out=0.0).summary["files"] == 3


def test_one_file_is_split_at_its_end(tmp_path):
    text = bytes(range(33, 127)) * 20
    write(tmp_path / "text", **{"all.txt": text})
    source = open_folder(tmp_path, held_out=0.1)
    cut = len(text) - len(text) // 10
    assert source.held_out_bytes() == text[cut:]
    assert text[:cut].startswith(training_text(source)) and source.summary["bytes"] == cut


def test_a_long_file_becomes_several_documents_of_the_same_split(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 100)
    texts = {f"{name}.txt": name.encode() * 250 for name in "abcdefgh"}
    write(tmp_path / "text", **texts)
    source = open_folder(tmp_path, held_out=0.4)
    assert source.summary["documents"] + source.summary["held-out documents"] == 3 * len(texts)
    held = source.held_out_bytes()
    assert held and all(held.count(text[:1]) in (0, 250) for text in texts.values())


def test_the_split_depends_on_names_alone(tmp_path):
    files = {f"{index}.txt": bytes([33 + index]) * 40 for index in range(60)}
    for root in ("text", "elsewhere"):
        write(tmp_path / root, **files)
    held = open_folder(tmp_path, held_out=0.3).held_out_bytes()
    assert 0.1 < len(held) / (60 * 40) < 0.5
    assert open_folder(tmp_path, name=str(tmp_path / "elsewhere"), held_out=0.3).held_out_bytes() == held
    for index in range(60, 90):
        write(tmp_path / "text", **{f"{index}.txt": bytes([33 + index]) * 40})
    grown = open_folder(tmp_path, held_out=0.3).held_out_bytes()
    assert {byte for byte in grown if byte < 33 + 60} == set(held)


def test_two_processes_may_prepare_the_same_folder_at_once(tmp_path, monkeypatch):
    """The second one prepares it as a whole while the first one is at it."""
    from striate.lib.training.data.builder import StriateText

    write(tmp_path / "text", a=b"a" * 60, b=b"b" * 61)
    generate, sources = StriateText._generate_examples, []

    def overtaken(self, documents):
        monkeypatch.setattr(StriateText, "_generate_examples", generate)
        sources.append(open_folder(tmp_path, held_out=0.0))
        yield from generate(self, documents)

    monkeypatch.setattr(StriateText, "_generate_examples", overtaken)
    sources.append(open_folder(tmp_path, held_out=0.0))
    assert len(sources) == 2 and sources[0].summary == sources[1].summary
    assert len(list((tmp_path / "prepared" / "striate_text").rglob("*train*array_record*"))) == 1


def test_a_disk_that_is_full_is_not_taken_for_another_process(tmp_path, monkeypatch):
    from striate.lib.training.data.builder import StriateText

    def full(self, documents):
        raise OSError(28, "No space left on device")

    write(tmp_path / "text", a=b"a" * 60, b=b"b" * 61)
    monkeypatch.setattr(StriateText, "_generate_examples", full)
    message = refused(tmp_path)
    assert "No space left on device" in message and f"data.data_dir={str(tmp_path / 'prepared')!r}" in message


# TFDS names


@pytest.fixture(scope="module")
def builder():
    """A TFDS set defined here, registered by its class name as every TFDS set is: "striate_test_set"."""
    import tensorflow_datasets as tfds

    class StriateTestSet(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS: ClassVar = [
            tfds.core.BuilderConfig(name=name) for name in ("own_split", "train_only", "test_only")
        ]

        def _info(self):
            features = {"text": tfds.features.Text(), "title": np.str_, "year": np.int64}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            names = {"own_split": ("train", "validation"), "train_only": ("train",), "test_only": ("test",)}
            return {name: self._generate_examples(name) for name in names[self.builder_config.name]}

        def _generate_examples(self, split):
            for index in range(200 if split == "train" else 20):
                yield index, {"text": f"{split} {index};" * 3, "title": f"title {index};", "year": 1900 + index}

    return StriateTestSet


def open_set(tmp_path, config, **fields):
    return open_folder(tmp_path, name=f"striate_test_set/{config}", **fields)


def test_a_tfds_set_with_a_split_of_its_own(tmp_path, builder):
    source = open_set(tmp_path, "own_split")
    assert source.summary["documents"] == 200 and source.summary["held-out documents"] == 20
    held = source.held_out_bytes()
    assert {f"validation {index};".encode() for index in range(20)} == {text + b";" for text in held.split(b";")[:-1]}
    assert b"validation" not in training_text(source)
    assert Path(source.summary["prepared in"]).is_relative_to(tmp_path)
    assert list(Path(source.summary["prepared in"]).glob("*.array_record*"))


def test_a_tfds_set_without_one_is_split_by_a_hash_of_the_index(tmp_path, builder):
    source = open_set(tmp_path, "train_only", held_out=0.2)
    held = set(source.held_out_bytes().split(b";")) - {b""}
    trained = set(training_text(source).split(b";")[:-1]) - {b""}
    assert not held & trained
    assert 20 <= len(held) <= 60 and len(held) + source.summary["documents"] == 200
    assert set(open_set(tmp_path, "train_only", held_out=0.2, seed=5).held_out_bytes().split(b";")) - {b""} == held
    assert open_set(tmp_path, "train_only", held_out=0.0001).summary["held-out documents"] == 1
    assert open_set(tmp_path, "train_only", held_out=0.0).held_out_bytes() == b""


def test_another_feature_may_hold_the_text(tmp_path, builder):
    source = open_set(tmp_path, "own_split", text_key="title")
    assert source.held_out_bytes().startswith(b"title")
    assert open_set(tmp_path, "own_split").held_out_bytes().startswith(b"validation")


def test_a_prepared_set_opens_by_name_without_its_code(tmp_path, builder):
    """As a set does that another machine prepared: TFDS reads it from the files in data_dir."""
    summary = open_set(tmp_path, "own_split").summary
    renamed = tmp_path / "prepared" / "striate_renamed_set"
    (tmp_path / "prepared" / "striate_test_set").rename(renamed)
    for path in sorted(renamed.rglob("*striate_test_set*")):
        path.rename(path.with_name(path.name.replace("striate_test_set", "striate_renamed_set")))
    for path in renamed.rglob("dataset_info.json"):
        path.write_text(path.read_text().replace("striate_test_set", "striate_renamed_set"))
    again = open_folder(tmp_path, name="striate_renamed_set/own_split:1.0.0")
    assert again.summary["documents"] == summary["documents"]


# What is answered


def refused(tmp_path, **fields):
    with pytest.raises(UserError) as caught:
        open_folder(tmp_path, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"length": 0}, ["data.length is 0", "at least 1"]),
        ({"batch": -1}, ["data.batch is -1", "at least 1"]),
        ({"seed": -3}, ["data.seed is -3", "between 0"]),
        ({"held_out": 1.0}, ["data.held_out is 1.0", "less than 1"]),
        ({"held_out_cap": -1}, ["data.held_out_cap is -1"]),
        ({"ngram_orders": (2, 0)}, ["data.ngram_orders is (2, 0)"]),
        ({"ngram_buckets": 0}, ["data.ngram_buckets is 0"]),
        ({"length": 1000}, ["123 tokens in 2 documents", "data.length=1000 takes 1001", "smaller data.length"]),
        ({"glob": "*.nothing"}, ["No text in the folder", "0 files match data.glob='*.nothing'"]),
        ({"glob": "/etc/*"}, ["data.glob='/etc/*' is no pattern"]),
        ({"name": "/nowhere/at/all"}, ["folder data.name='/nowhere/at/all' does not exist"]),
        ({"name": "./nowhere"}, ["folder data.name='./nowhere' does not exist"]),
        ({"name": "~/nowhere/at all"}, ["folder data.name='~/nowhere/at all' does not exist"]),
        ({"name": "lmb1"}, ["'lmb1'", "nearest: lm1b", "TFDS", "path of a folder"]),
        ({"name": "wiki4b/en"}, ["nearest: wiki40b"]),
        ({"name": ""}, ["data.name=''"]),
        ({"name": "huggingface:lm1b"}, ["data.name='huggingface:lm1b'"]),
        ({"name": "wiki40b/qq"}, ["TFDS has 'wiki40b', but not 'wiki40b/qq'"]),
        ({"name": "lm1b:7.7.7"}, ["TFDS has 'lm1b', but not 'lm1b:7.7.7'", "1.1.0"]),
    ],
)
def test_bad_input_is_answered_in_one_sentence(tmp_path, fields, parts):
    write(tmp_path / "text", a=b"a" * 60, b=b"b" * 61)
    message = refused(tmp_path, **{"held_out": 0.0, **fields})
    assert all(part in message for part in parts), message


def test_a_file_is_answered_with_its_folder_and_pattern(tmp_path):
    write(tmp_path / "text", **{"all.txt": b"text" * 50})
    message = refused(tmp_path, name=str(tmp_path / "text" / "all.txt"))
    assert f"data.name={str(tmp_path / 'text')!r}" in message and "data.glob='all.txt'" in message


def test_a_folder_of_binary_files_is_answered_with_their_number(tmp_path):
    write(tmp_path / "text", a=b"\0" * 60, b=b"\0b" * 61, c=b"")
    message = refused(tmp_path)
    assert "3 files match data.glob='**/*', 2 of them are unreadable or binary" in message


@pytest.mark.parametrize("key", ["body", "year"])
def test_a_missing_text_feature_is_answered_with_those_there(tmp_path, builder, key):
    message = refused(tmp_path, name="striate_test_set/own_split", text_key=key)
    assert f"data.text_key={key!r}" in message and "it has text, title" in message


def test_a_set_without_a_training_split_is_refused(tmp_path, builder):
    assert "no split 'train', only test" in refused(tmp_path, name="striate_test_set/test_only")


def test_a_set_whose_preparation_fails_is_answered_with_the_reason(tmp_path, builder, monkeypatch):
    def broken(self, split):
        raise RuntimeError("the server is gone\nand its backup too")

    monkeypatch.setattr(builder, "_generate_examples", broken)
    message = refused(tmp_path, name="striate_test_set/own_split")
    assert "could not prepare 'striate_test_set/own_split'" in message and "the server is gone" in message


def test_a_set_prepared_without_random_access_is_refused(tmp_path, builder):
    prepared = Path(open_set(tmp_path, "own_split").summary["prepared in"])
    info = json.loads((prepared / "dataset_info.json").read_text())
    (prepared / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    message = refused(tmp_path, name="striate_test_set/own_split")
    assert "as tfrecord" in message and str(prepared) in message and "data.data_dir" in message
