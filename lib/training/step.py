"""One step of training and one of evaluation: pure functions, and the program that compiles them for a mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from striate.lib.text import BOUNDARY
from striate.lib.tokens import Tokens
from striate.lib.training import data, objectives, optimiser, partition
from striate.models.decoder import Decoder, DecoderConfig


class TrainState(NamedTuple):
    """All that a step changes, and all that a checkpoint holds."""

    step: jax.Array
    """int32 (): batches trained on."""
    params: Any
    """float32 arrays by module and name."""
    opt_state: Any
    """What optax keeps, spread like the parameters."""


class Program:
    """A run's program on a mesh; what is used of it is compiled once, when it is first asked for.

    Args:
      experiment: has .model, .data, .optimiser, .mesh and .run.
      mesh: from partition.make_mesh(experiment.mesh).
    """

    def __init__(self, experiment, mesh: Mesh):
        self.mesh = mesh
        self._seed, self._accumulate = experiment.run.seed, experiment.optimiser.accumulate
        self._model = Decoder(experiment.model, partition.parallel(experiment.mesh, mesh))
        self._rate = optimiser.schedule(experiment.optimiser, experiment.run.steps)
        params = jax.eval_shape(lambda: _parameters(experiment.model, self._seed))
        self._update = optimiser.make(experiment.optimiser, experiment.run.steps, params)
        self._batch = abstract_batch(experiment.data, mesh)
        abstract = jax.eval_shape(self._fresh)
        self._shardings = partition.parameter_shardings(abstract, mesh)
        self.state: TrainState = jax.tree.map(_with_sharding, nn.unbox(abstract), self._shardings)
        """Shapes, dtypes and shardings of the state."""

    def initialise(self) -> TrainState:
        """The state at step 0."""
        return jax.jit(lambda: nn.unbox(self._fresh()), out_shardings=self._shardings)()

    @functools.cached_property
    def train(self) -> jax.stages.Compiled:
        """(state, batch) -> (state, metrics) as in `train_step`; the state given is donated."""

        def train(state, batch):
            return train_step(self._model, self._update, self._learning_rate, state, batch, self.mesh)

        outputs = self._shardings, partition.replicated(self.mesh)
        return self._compile(jax.jit(train, donate_argnums=0, out_shardings=outputs), self.state)

    @functools.cached_property
    def evaluate(self) -> jax.stages.Compiled:
        """(params, batch) -> `losses`, whole on every process."""

        def evaluate(params, batch):
            return losses(self._model, params, batch, self.mesh)

        return self._compile(jax.jit(evaluate, out_shardings=partition.replicated(self.mesh)), self.state.params)

    def _compile(self, function, first) -> jax.stages.Compiled:
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(partition.RULES):
            return function.lower(first, self._batch).compile()

    def _learning_rate(self, step: jax.Array) -> jax.Array:
        return self._rate(step // self._accumulate)

    def _fresh(self) -> TrainState:
        params = _parameters(self._model.config, self._seed)
        return TrainState(jnp.zeros((), jnp.int32), params, self._update.init(params))


def abstract_batch(config: data.DataConfig, mesh: Mesh) -> data.Batch:
    """Shapes, dtypes and shardings of a batch of the config."""
    sharding = partition.batch_sharding(mesh)

    def array(dtype, *last: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch, config.length, *last), dtype, sharding=sharding)

    ids = array(jnp.int32)
    ngrams = array(jnp.int32, len(config.ngram_orders))
    return data.Batch(ids, ids, array(jnp.float32), Tokens(position=ids, document=ids), ngrams)


def train_step(model: Decoder, update: optax.GradientTransformation, rate: optax.Schedule, state, batch, mesh: Mesh):
    """One step of gradient descent on the mean loss per token of a batch.

    Returns:
      The next state, and float32 scalars: loss (nats per token), bits_per_byte (all the loss, in bits, over the bytes
      among the targets), grad_norm (before clipping), learning_rate, tokens.
    """

    (loss, nll), gradients = jax.value_and_grad(mean_loss, argnums=1, has_aux=True)(model, state.params, batch, mesh)
    updates, opt_state = update.update(gradients, state.opt_state, state.params)
    bytes_seen = (batch.weights * (batch.targets < BOUNDARY)).sum()
    metrics = {
        "loss": loss,
        "bits_per_byte": nll / jnp.maximum(bytes_seen, 1.0) / math.log(2.0),
        "grad_norm": optax.tree.norm(gradients),
        "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
        "tokens": batch.weights.sum(),
    }
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics


def mean_loss(model: Decoder, params, batch, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """(mean loss per token, in nats, whose gradient trains; the sum of the losses)."""
    nll = (losses(model, params, batch, mesh) * batch.weights).sum()
    return nll / jnp.maximum(batch.weights.sum(), 1.0), nll


def losses(model: Decoder, params, batch, mesh: Mesh) -> jax.Array:
    """-log p of every target of a batch, in nats: float32 (B, T), in the order of the batch."""
    hidden_BTE = model.apply({"params": params}, batch.inputs, batch.tokens, batch.ngrams)
    chunk, sharding = model.config.loss_chunk, partition.batch_sharding(mesh)
    return objectives.token_losses(hidden_BTE, params["embedding"], batch.targets, chunk, sharding)


def _parameters(config: DecoderConfig, seed: int):
    """Fresh parameters, with their logical names. Their shapes know no length, so one token is enough to find them."""
    one, ngrams = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, len(config.ngram_orders)), jnp.int32)
    model = Decoder(dataclasses.replace(config, implementation="reference"))
    return model.init(jax.random.key(seed), one, Tokens.arange(1, 1), ngrams)["params"]


def _with_sharding(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
