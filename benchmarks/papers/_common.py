"""What the benchmarks of published systems share: a small trainer, and the report of what was asked and reached."""

from __future__ import annotations

import argparse
import functools
import json
import math
import runpy
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from rich.console import Console
from rich.progress import track
from rich.table import Table

from striate import Tokens
from striate.models.decoder import Decoder, DecoderConfig, Layer

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = 25  # steps of training in one call


def small(task, *pattern: Layer, **sizes) -> DecoderConfig:
    """A decoder of width 64 with 2 heads, one layer for each of the pattern."""
    usual = {"width": 64, "heads": 2, "kv_heads": 2, "head_dim": 32, "hidden": 128, "layers": len(pattern)}
    return DecoderConfig(vocabulary=task.vocabulary, pattern=pattern, **{**usual, **sizes})


def trained(
    config: DecoderConfig, task, *, params=None, steps: int = 600, rate: float = 3e-3, batch: int = 64, seed: int = 0
):
    """The parameters of a decoder after `steps` steps of Adam on the scored slots of fresh rows of a task.

    It goes on from `params`, where they are given.
    """
    model = Decoder(config)

    def loss(params, key):
        rows = jax.vmap(task.sample)(jax.random.split(key, batch))
        nll = optax.softmax_cross_entropy_with_integer_labels(_logits(model, params, rows.inputs), rows.targets)
        return (nll * rows.weights).sum() / rows.weights.sum()

    start, data = jax.random.split(jax.random.key(seed))
    inputs = jnp.zeros((1, task.length), jnp.int32)
    if params is None:
        params = nn.unbox(jax.jit(model.init)(start, inputs, Tokens.arange(1, task.length)))["params"]
    return fit(loss, params, steps, rate, data)


def accuracy(config: DecoderConfig, task, **training) -> float:
    """Share of the scored slots of 1024 fresh rows that a decoder answers rightly once it is `trained`."""
    params = trained(config, task, **training)
    rows = jax.vmap(task.sample)(jax.random.split(jax.random.key(-1), 1024))
    answers = jax.jit(lambda params: _logits(Decoder(config), params, rows.inputs).argmax(-1))(params)
    return float(((answers == rows.targets) * rows.weights).sum() / rows.weights.sum())


def normalised_error(model: nn.Module, sample: Callable, *, steps: int, known: int | None = None, slots=slice(None)):
    """Squared error over the variance of the targets, in 1024 fresh rows, once a model of vectors is trained.

    Args:
      model: called as (x (B, T, C), tokens).
      sample: gives (x (T, C), targets) of a key.
      steps: of Adam, on 64 rows each.
      known: how many rows there are to learn from; None for always fresh ones.
      slots: of the outputs, that are compared.
    """

    def rows(keys):
        x, targets = jax.vmap(sample)(keys)
        return x, targets, Tokens.arange(*x.shape[:2])

    def loss(params, key):
        x, targets, tokens = rows(jax.random.choice(key, pool, (64,)) if known else jax.random.split(key, 64))
        return ((model.apply(params, x, tokens) - targets) ** 2).mean()

    start, data, held_out = jax.random.split(jax.random.key(0), 3)
    pool = jax.random.split(data, known or 1)
    x, _, tokens = rows(pool[:1])
    params = fit(loss, nn.unbox(jax.jit(model.init)(start, x, tokens)), steps, 3e-3, data)
    x, targets, tokens = rows(jax.random.split(held_out, 1024))
    got, targets = jax.jit(model.apply)(params, x, tokens)[:, slots], targets[:, slots]
    return float(((got - targets) ** 2).mean() / targets.var())


def _logits(model: Decoder, params, inputs):
    hidden = model.apply({"params": params}, inputs, Tokens.arange(*inputs.shape))
    return model.apply({"params": params}, hidden, method="logits")


def fit(loss: Callable, params, steps: int, rate: float, key, update: optax.GradientTransformation | None = None):
    """The parameters after `steps` steps on loss(params, key of the step): Adam, warmed up, to a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps, 0.02 * rate)
    update = update or optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @functools.partial(jax.jit, donate_argnums=0)
    def some(carry, keys):
        def step(carry, key):
            params, state = carry
            gradients = jax.grad(loss)(params, key)
            updates, state = update.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, keys)[0]

    carry = jax.tree.map(jnp.array, params), update.init(params)
    keys = jax.random.split(key, math.ceil(steps / AT_ONCE) * AT_ONCE).reshape(-1, AT_ONCE)
    for of_steps in track(keys, description="training", transient=True):
        carry = some(carry, of_steps)
        jax.block_until_ready(carry)
    return carry[0]


def report(file: str, measure: Callable[[], dict[str, float]]) -> None:
    """Runs the benchmark of the system that the file is named after, and shows what was asked and reached.

    With --json FILE the figures go into that file, beside those of other systems: configs/papers/results.json is what
    `striate systems` shows.
    """
    name = Path(file).stem
    system = runpy.run_path(str(ROOT / f"configs/papers/{name}.py"))["system"]
    parser = argparse.ArgumentParser(description=f"{system.paper}: what its benchmark reaches.")
    parser.add_argument("--json", type=Path, help="also put the figures into this file")
    arguments = parser.parse_args()
    start = time.perf_counter()
    reached = measure()
    if reached.keys() != system.asks.keys():
        raise SystemExit(f"{name} measured {sorted(reached)}, and its config asks for {sorted(system.asks)}.")
    table = Table("measured", "asked", "reached", title=system.paper, box=None, title_justify="left")
    for what, (relation, figure) in system.asks.items():
        colour = "green" if system.meets(what, reached[what]) else "red"
        table.add_row(what, f"{relation} {figure:g}", f"[{colour}]{reached[what]:.4g}")
    Console(width=120).print(table)
    if arguments.json:
        known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        known[name] = {what: float(f"{value:.4g}") for what, value in reached.items()}
        known[name]["seconds"] = round(time.perf_counter() - start)
        arguments.json.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")
