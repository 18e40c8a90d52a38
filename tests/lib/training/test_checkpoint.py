"""Checkpoints: what was saved comes back bit by bit, on any mesh, or it is said that it does not."""

import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from striate.lib.errors import UserError
from striate.lib.training import partition
from striate.lib.training.checkpoint import Checkpoints, digests

# When one array cannot be read, orbax abandons the coroutines that read the others, and they complain when collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class State(NamedTuple):
    step: jax.Array
    params: dict


MESH = partition.MeshConfig(sequence=8)


def on(mesh, state):
    """The state, cut over a mesh."""
    mesh = partition.make_mesh(mesh)
    cut, whole = NamedSharding(mesh, PartitionSpec(None, ("fsdp", "sequence"))), NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(x, cut if x.ndim == 2 else whole), state)


def like(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def state_at(step):
    random = np.random.default_rng(step)
    shapes = {"w": ((48, 64), jnp.float32), "b": ((64,), jnp.float32), "half": ((8, 16), jnp.bfloat16)}
    params = {name: jnp.asarray(random.normal(size=shape), dtype) for name, (shape, dtype) in shapes.items()}
    params["noise"] = jnp.asarray(random.integers(2**32, size=(16, 64), dtype=np.uint32))
    return State(jnp.int32(step), params)


def save(directory, *steps, held_out=None):
    """Saves the states of some steps; (held_out or {})[step] are their losses."""
    with Checkpoints(directory, keep=len(steps)) as checkpoints:
        for step in steps:
            checkpoints.save(step, on(MESH, state_at(step)), (held_out or {}).get(step))


def assert_is_step(restored, step):
    assert restored.step == step
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_at(step))


def data_files(directory, step):
    """The files of a step that hold its arrays, largest first."""
    files = [path for path in (directory / str(step) / "state").rglob("*") if path.is_file() and "/d/" in str(path)]
    return sorted(files, key=lambda path: -path.stat().st_size)


def flip(file, index, bit):
    """Changes one bit of a file; returns what it was."""
    content = file.read_bytes()
    file.write_bytes(content[:index] + bytes([content[index] ^ 1 << bit]) + content[index + 1 :])
    return content


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("mesh", [MESH, partition.MeshConfig(fsdp=2, sequence=2), partition.MeshConfig(sequence=1)])
def test_a_step_is_restored_bit_by_bit_on_any_mesh(directory, mesh):
    save(directory, 3, 5)
    target = like(on(mesh, state_at(0)))
    with Checkpoints(directory, writable=False) as checkpoints:
        restored = checkpoints.restore(target)
    assert_is_step(restored, 5)
    assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(lambda x: x.sharding, target)


def test_an_empty_folder_restores_nothing(directory):
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.restore(like(on(MESH, state_at(0)))) is None


def test_a_saved_state_may_be_donated_at_once(directory):
    # The next step writes into the buffers while the checkpoint is still on its way to the disk.
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = on(MESH, state_at(0))
    with Checkpoints(directory, keep=9) as checkpoints:
        for step in range(9):
            checkpoints.save(step, state)
            state = advance(state)
        restored = checkpoints.restore(like(state))
    assert int(restored.state.step) == 8


def test_the_newest_and_the_best_are_kept(directory):
    with Checkpoints(directory, keep=2) as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 2.0, None, 2.5, None]):
            checkpoints.save(step, on(MESH, state_at(step)), loss)
    assert sorted(path.name for path in directory.iterdir()) == ["1", "4", "5"]
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.restore(like(on(MESH, state_at(0))), best=True).step == 1
        checkpoints.save(6, on(MESH, state_at(6)), 1.5)
    assert sorted(path.name for path in directory.iterdir()) == ["1", "5", "6"]  # the best was remembered


@pytest.mark.parametrize("row", [0, 7, 15])
def test_a_flipped_bit_is_found_and_the_step_before_is_taken(directory, row, capfd):
    save(directory, 1, 2)
    # What compression cannot shorten is stored as it is; a bit of anything else may be one that decoding ignores.
    value = np.asarray(state_at(2).params["noise"])[row, :8].tobytes()
    holders = [file for file in data_files(directory, 2) if value in file.read_bytes()]
    assert holders
    for file in holders:
        flip(file, file.read_bytes().index(value) + 2 * row, 4)
    said = []
    with Checkpoints(directory, say=said.append) as checkpoints:
        restored = checkpoints.restore(like(on(MESH, state_at(0))))
        assert_is_step(restored, 1)
        assert len(said) == 1 and "Checkpoint 2" in said[0]
        checkpoints.save(2, on(MESH, state_at(2)))
        assert_is_step(checkpoints.restore(like(on(MESH, state_at(0)))), 2)
    assert (directory.parent / "damaged" / "2").is_dir()
    assert capfd.readouterr().err == ""


@pytest.mark.long
def test_whatever_bit_is_flipped_what_comes_back_is_what_was_saved(directory):
    save(directory, 1, 2)
    target, random = like(on(MESH, state_at(0))), np.random.default_rng(3)
    files = sorted(path for path in (directory / "2").rglob("*") if path.is_file())
    assert len(files) > 6
    taken = []
    for file in files:
        before = flip(file, random.integers(file.stat().st_size), random.integers(8))
        with Checkpoints(directory, writable=False, say=lambda line: None) as checkpoints:
            restored = checkpoints.restore(target)
        assert_is_step(restored, restored.step)
        taken.append(restored.step)
        file.write_bytes(before)
    assert set(taken) == {1, 2}  # some bits are not read; those that are were noticed


@pytest.mark.parametrize("damage", ["truncated", "data missing", "record missing", "half deleted"])
def test_a_step_that_is_not_whole_is_passed_over(directory, damage):
    save(directory, 1, 2)
    if damage == "truncated":
        file = data_files(directory, 2)[0]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        gone = {"data missing": "state/d", "record missing": "record", "half deleted": "state"}[damage]
        shutil.rmtree(directory / "2" / gone)
    said = []
    with Checkpoints(directory, say=said.append) as checkpoints:
        assert_is_step(checkpoints.restore(like(on(MESH, state_at(0)))), 1)
    assert len(said) == 1 and "Checkpoint 2" in said[0]


def test_reading_moves_nothing(directory):
    save(directory, 1, 2)
    shutil.rmtree(directory / "2" / "record")
    with Checkpoints(directory, writable=False, say=lambda line: None) as checkpoints:
        assert_is_step(checkpoints.restore(like(on(MESH, state_at(0)))), 1)
    assert (directory / "2").is_dir()
    assert not (directory.parent / "damaged").exists()


def test_no_whole_step_is_an_error_and_not_a_fresh_start(directory):
    save(directory, 1, 2)
    for step in (1, 2):
        shutil.rmtree(directory / str(step) / "record")
    with (
        Checkpoints(directory, say=lambda line: None) as checkpoints,
        pytest.raises(UserError, match=r"None of the 2 checkpoints .* another --run\.name"),
    ):
        checkpoints.restore(like(on(MESH, state_at(0))))


def test_digests_are_the_same_on_every_mesh():
    meshes = [MESH, partition.MeshConfig(data=2, fsdp=2, sequence=2), partition.MeshConfig(sequence=1)]
    first, *others = [digests(on(mesh, state_at(1))) for mesh in meshes]
    assert first.keys() == {"step", "params/w", "params/b", "params/half", "params/noise"}
    assert all(other == first for other in others)


def test_every_flipped_bit_changes_the_digest_of_its_array_alone():
    state, random = state_at(1), np.random.default_rng(2)
    before = digests(state)
    for name, array in state.params.items():
        raw = np.asarray(array)
        for _ in range(20):
            flipped = raw.copy()
            view = flipped.reshape(-1).view(np.uint8)
            view[random.integers(view.size)] ^= np.uint8(1 << random.integers(8))
            after = digests(state._replace(params={**state.params, name: jnp.asarray(flipped)}))
            assert {path for path in before if before[path] != after[path]} == {f"params/{name}"}


def test_digests_know_the_order_of_the_elements():
    x = jnp.arange(12.0).reshape(3, 4)
    assert digests({"x": x}) != digests({"x": x[::-1]}) != digests({"x": x.reshape(12)[::-1].reshape(3, 4)})
    assert digests({"x": jnp.zeros(4)}) != digests({"x": jnp.zeros(5)})
