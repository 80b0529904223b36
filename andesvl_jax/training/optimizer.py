"""AdamW with one learning rate per part of the model; a part with rate 0 is frozen and holds no moments."""

import jax
import optax

from andesvl_jax.model.andesvl import AndesVL
from andesvl_jax.training.config import PARTS, Optimizer
from andesvl_jax.weights import is_param


def make_optimizer(config: Optimizer, description: AndesVL, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with warm-up and cosine to `final_fraction` of each part's peak.

    Args:
      description: tree of `Param`; matrices and tables decay, norms and biases do not.
    """

    def adamw(peak: float, weight_decay: float) -> optax.GradientTransformation:
        if peak == 0:
            return optax.set_to_zero()
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, steps, peak * config.final_fraction)
        return optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=weight_decay)

    decays = {"matrices": config.weight_decay, "vectors": 0.0}
    transforms = {f"{part} {kind}": adamw(getattr(config, part), decay) for part in PARTS for kind, decay in decays.items()}

    def labels(part: str):
        kind = lambda p: "matrices" if p.init not in ("ones", "zeros") else "vectors"  # noqa: E731
        return jax.tree.map(lambda p: f"{part} {kind(p)}", getattr(description, part), is_leaf=is_param)

    by_part = AndesVL(**{part: labels(part) for part in PARTS})
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.multi_transform(transforms, by_part))


def freeze(params: AndesVL, config: Optimizer) -> AndesVL:
    """Cuts the gradient to frozen parts, so that their backward pass is not computed."""
    return params.replace(**{p: jax.lax.stop_gradient(getattr(params, p)) for p in PARTS if getattr(config, p) == 0})
