"""AdamW with clipping, linear warm-up, cosine decay and accumulation, all from optax."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import optax
from flax import linen as nn

from striate.lib.errors import UserError


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW (Loshchilov and Hutter 2019) with clipping by the global norm, linear warm-up and cosine decay."""

    learning_rate: float = 3e-3
    """The peak, reached after the warm-up."""
    warmup: int = 50
    """Updates of linear warm-up."""
    final_fraction: float = 0.1
    """Learning rate of the last update, as a fraction of the peak."""
    beta1: float = 0.9
    """Decay of the mean of the gradients."""
    beta2: float = 0.95
    """Decay of the mean of the squared gradients."""
    epsilon: float = 1e-8
    """Added to the root of the squared gradients."""
    weight_decay: float = 0.1
    """Decay per update, times the learning rate; norms, which have one axis, are left out."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    accumulate: int = 1
    """Steps whose gradients are averaged into one update."""


def schedule(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """Learning rate by update, for a run of `steps` steps."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup,
        decay_steps=steps // config.accumulate,
        end_value=config.learning_rate * config.final_fraction,
    )


def make(config: OptimiserConfig, steps: int, parameters) -> optax.GradientTransformation:
    """The optimiser of a run of `steps` steps.

    Args:
      parameters: their abstract tree with logical names (flax metadata boxes), which say what is decayed: whatever has
        two axes or more beside the stack of "layers".
    """
    names = nn.get_partition_spec(parameters)
    decayed = jax.tree.map(lambda axes: sum(name not in (None, "layers") for name in axes) > 1, names)
    update = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
    if config.accumulate == 1:
        return update
    return optax.MultiSteps(update, config.accumulate).gradient_transformation()


def check(config: OptimiserConfig, steps: int) -> None:
    """Raises UserError for a schedule that does not fit into the run."""
    if config.accumulate < 1 or steps % config.accumulate:
        raise UserError(
            f"A run of {steps} steps cannot be cut into updates of {config.accumulate} accumulated steps: "
            f"set --run.steps to a multiple of --optimiser.accumulate."
        )
    if not 0 <= config.warmup < steps // config.accumulate:
        raise UserError(
            f"A warm-up of {config.warmup} updates does not fit into a run of {steps // config.accumulate}: "
            f"set --optimiser.warmup below that, or --run.steps higher."
        )
