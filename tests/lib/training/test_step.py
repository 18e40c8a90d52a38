"""The step: the same loss and gradients in every token order, on every mesh, and a state that is where it should be."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from striate.lib.text import BOUNDARY
from striate.lib.training import data, optimiser, partition, step
from striate.lib.training.evaluation import held_out_loss, xz_bits_per_byte
from striate.lib.training.optimiser import OptimiserConfig
from striate.lib.training.partition import MeshConfig
from striate.models.decoder import Decoder

ONE_DEVICE = MeshConfig(sequence=1, layout="contiguous", strategy="none")


@pytest.fixture(scope="module")
def batch(tiny):
    """The first batch, in natural order."""
    return data.open_source(tiny.data).batch(0)


@pytest.fixture(scope="module")
def program_on(tiny):
    """program_on(mesh config): the tiny run's program there; what it compiles is kept for this module."""
    return functools.cache(lambda mesh: step.Program(dataclasses.replace(tiny, mesh=mesh), partition.make_mesh(mesh)))


@pytest.fixture(scope="module")
def params(tiny, program_on):
    """The parameters of the seed, on the host."""
    return jax.device_get(program_on(tiny.mesh).initialise().params)


@pytest.fixture(scope="module")
def loss_and_gradients(tiny, program_on, params):
    """loss_and_gradients(mesh config, batch in its layout): on the host, with the parameters of the seed."""

    @functools.cache
    def compiled(config):
        mesh = program_on(config).mesh
        model = Decoder(tiny.model, partition.parallel(config, mesh))
        return jax.jit(jax.value_and_grad(lambda params, batch: step.mean_loss(model, params, batch, mesh)[0]))

    def evaluate(config, batch):
        config = dataclasses.replace(
            config, layout="contiguous", stripe=1
        )  # the order is the batch's, not the program's
        program = program_on(config)
        on_mesh = jax.tree.map(lambda x, plan: jax.device_put(x, plan.sharding), params, program.state.params)
        with jax.set_mesh(program.mesh), nn.logical_axis_rules(partition.RULES):
            loss, gradients = compiled(config)(on_mesh, partition.put(batch, program.mesh))
        return float(loss), jax.device_get(gradients)

    return evaluate


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(layout="contiguous"),
        MeshConfig(layout="striped", stripe=1),
        MeshConfig(layout="striped", stripe=16),
        MeshConfig(layout="zigzag"),
        MeshConfig(layout="striped", stripe=16, strategy="allgather"),
        MeshConfig(layout="zigzag", fsdp=2, sequence=2, tensor=2),
    ],
    ids=lambda config: f"{config.layout}{config.stripe}-{config.strategy}-{'x'.join(map(str, config.shape))}",
)
def test_every_layout_and_mesh_has_the_loss_and_gradients_of_one_device(loss_and_gradients, batch, config):
    true_loss, true_gradients = loss_and_gradients(ONE_DEVICE, batch)
    loss, gradients = loss_and_gradients(config, partition.layout(config).permute(batch))
    assert loss == pytest.approx(true_loss, rel=1e-6)
    for path, true in jax.tree.leaves_with_path(true_gradients):
        given = dict(jax.tree.leaves_with_path(gradients))[path]
        np.testing.assert_allclose(given, true, atol=1e-5 * np.abs(true).max(), rtol=1e-5, err_msg=str(path))


def test_tokens_that_do_not_travel_with_the_layout_change_the_loss(loss_and_gradients, tiny, batch):
    # The control of the test above: had the order been ignored, it would not have noticed.
    permuted = partition.layout(tiny.mesh).permute(batch)
    loss, _ = loss_and_gradients(tiny.mesh, permuted)
    wrong, _ = loss_and_gradients(tiny.mesh, permuted._replace(tokens=batch.tokens))
    assert abs(wrong / loss - 1) > 1e-4


def test_parameters_and_optimiser_state_are_spread_over_the_sequence_shards(tiny, program_on):
    state = program_on(tiny.mesh).state
    whole = sum(leaf.size for leaf in jax.tree.leaves(state))
    local = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state))
    assert local < 0.15 * whole  # an eighth, and the norms that every device holds


def test_the_state_starts_and_stays_where_it_was_planned(tiny, program_on, batch):
    program = program_on(tiny.mesh)
    state = program.initialise()
    trained, _ = program.train(state, partition.put(partition.layout(tiny.mesh).permute(batch), program.mesh))
    for now in (state, trained):
        stays = jax.tree.map(lambda x, plan: x.sharding.is_equivalent_to(plan.sharding, x.ndim), now, program.state)
        assert all(jax.tree.leaves(stays))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))  # donated
    assert int(trained.step) == 1


def test_metrics_are_what_they_say(tiny, program_on, loss_and_gradients, batch):
    program, permuted = program_on(tiny.mesh), partition.layout(tiny.mesh).permute(batch)
    state, on_mesh = program.initialise(), partition.put(permuted, program.mesh)
    nll = np.asarray(program.evaluate(state.params, on_mesh), np.float64)
    _, metrics = program.train(state, on_mesh)
    metrics = {name: float(value) for name, value in metrics.items()}
    bytes_among_targets = (batch.targets < BOUNDARY).sum()
    assert bytes_among_targets < metrics["tokens"] == batch.weights.size
    assert metrics["loss"] == pytest.approx(nll.mean(), rel=1e-6)
    assert metrics["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / bytes_among_targets, rel=1e-6)
    assert metrics["learning_rate"] == pytest.approx(3e-3 / 4)
    _, gradients = loss_and_gradients(tiny.mesh, permuted)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)


def test_the_held_out_loss_is_that_of_all_bytes_once(tiny, program_on, params):
    source, program = data.open_source(tiny.data), program_on(tiny.mesh)
    # With an embedding of zeros every token is as likely as every other.
    zeros = jax.tree.map(lambda x, plan: jax.device_put(0 * x, plan.sharding), params, program.state.params)
    evaluation = held_out_loss(program, zeros, source, partition.layout(tiny.mesh))
    text = source.held_out_bytes()
    tokens = len(text) + source.summary["held-out documents"] - 1  # all are predicted but the first, a boundary
    assert evaluation.bits_per_byte == pytest.approx(math.log2(264) * tokens / len(text), rel=1e-6)
    seen = evaluation.bits_by_position[np.isfinite(evaluation.bits_by_position)]
    np.testing.assert_allclose(seen, math.log2(264), rtol=1e-6)


def test_xz_shrinks_repetition_and_no_noise():
    assert xz_bits_per_byte(b"a" * 10_000) < 0.1
    assert 8 < xz_bits_per_byte(np.random.default_rng(0).bytes(10_000)) < 8.1


def boxed(value, *names):
    return nn.LogicallyPartitioned(value, names)


def test_only_matrices_are_decayed():
    params = {
        "norm": boxed(jnp.ones((3, 4)), "layers", "embed"),
        "table": boxed(jnp.ones((4, 4)), "vocabulary", "embed"),
    }
    config = OptimiserConfig(learning_rate=1.0, warmup=0, weight_decay=0.5, final_fraction=1.0)
    update, plain = optimiser.make(config, 10, params), nn.unbox(params)
    updates, _ = update.update(jax.tree.map(jnp.zeros_like, plain), update.init(plain), plain)
    np.testing.assert_array_equal(updates["norm"], 0)
    np.testing.assert_allclose(updates["table"], -0.5)


def test_accumulated_steps_are_one_step_on_their_mean():
    config = OptimiserConfig(warmup=2, clip=1e9)
    params = {"table": boxed(jnp.ones((4, 4)), "vocabulary", "embed")}
    plain, random = nn.unbox(params), np.random.default_rng(0)
    gradients = [{"table": jnp.asarray(random.normal(size=(4, 4)), jnp.float32)} for _ in range(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
    whole = optimiser.make(config, 10, params)
    expected, _ = whole.update(mean, whole.init(plain), plain)
    halves = optimiser.make(dataclasses.replace(config, accumulate=2), 20, params)
    first, state = halves.update(gradients[0], halves.init(plain), plain)
    second, _ = halves.update(gradients[1], state, plain)
    np.testing.assert_array_equal(first["table"], 0)
    np.testing.assert_allclose(second["table"], expected["table"], rtol=1e-6)


def test_the_learning_rate_rises_and_falls():
    rate = optimiser.schedule(OptimiserConfig(learning_rate=1.0, warmup=4, final_fraction=0.1), 100)
    rates = np.array([rate(update) for update in range(101)])
    assert rates[0] == pytest.approx(0.2) and rates.argmax() == 4 and rates[4] == 1.0
    assert (np.diff(rates[:5]) > 0).all() and (np.diff(rates[4:]) < 0).all()
    assert rates[100] == pytest.approx(0.1)
