"""AdamW with one learning rate per part of the model."""

import jax
import jax.numpy as jnp
import optax

from andesvl_jax.model.andesvl import AndesVL
from andesvl_jax.training.config import PARTS, Optimizer
from andesvl_jax.weights import Param, is_param


def rate(config: Optimizer, step: jax.Array, steps: jax.Array) -> jax.Array:
    """Share of the peak learning rate at a step: linear warm-up, then cosine to `final_fraction` at `steps`.

    `steps` is traced, where optax's schedules want a Python number, so that stages of any length share one compiled step.
    """
    done = jnp.clip((step - config.warmup_steps) / (steps - config.warmup_steps), 0.0, 1.0)
    cosine = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return cosine * jnp.minimum(1.0, step / config.warmup_steps) if config.warmup_steps else cosine


def make_optimizer(config: Optimizer, description: AndesVL, steps: jax.Array | int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW at `rate` times each part's peak.

    Args:
      description: tree of `Param`, of the trained arrays alone; matrices and tables decay, norms and biases do not.
      steps: of the whole run.
    """

    def adamw(peak: float, weight_decay: float) -> optax.GradientTransformation:
        return optax.adamw(
            lambda step: peak * rate(config, step, steps), config.b1, config.b2, config.eps, weight_decay=weight_decay
        )

    decays = {"matrices": config.weight_decay, "vectors": 0.0}
    transforms = {f"{part} {kind}": adamw(getattr(config, part), decay) for part in PARTS for kind, decay in decays.items()}

    def labels(part: str):
        def label(p: Param) -> str:
            return f"{part} {'matrices' if len(p.shape) - p.stacked > 1 else 'vectors'}"

        return jax.tree.map(label, getattr(description, part), is_leaf=is_param)

    by_part = AndesVL(**{part: labels(part) for part in PARTS})
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.multi_transform(transforms, by_part))
