"""The batch that stopped a run, once more: which of its rows are not finite, and in which parameters it shows."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from andesvl_jax.checkpoints.hf import load
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.packing import Batch, Budget
from andesvl_jax.training.bad_batch import BAD_BATCH, BAD_MODEL, read_batch
from andesvl_jax.training.config import TrainConfig
from andesvl_jax.training.sharding import batch_sharding, check_budget, make_mesh, placement
from andesvl_jax.training.step import loss_sums, trainable
from andesvl_jax.weights import path_name
from andesvl_jax.weights.partition import combine, partition


def replay(config: TrainConfig, out: str | Path) -> dict[str, Any]:
    """Forward and backward of `out`/bad_batch.npz with the parameters in `out`/bad_model, as `config` trains.

    Returns:
      loss: of the whole batch; rows: those whose own loss or gradient is not finite; gradients: names of the parameters whose
      gradient of the whole batch is not finite.
    Raises:
      UserError: the run did not stop like that, or its files are damaged or of another network.
    """
    out = Path(out)
    batch = read_batch(out / BAD_BATCH)
    mesh = None if config.mesh is None else make_mesh(config.mesh)
    if mesh is not None:
        check_budget(Budget(len(batch.tokens), *config.budget.sizes), mesh)
    bundle = load(out / BAD_MODEL, config.model.param_dtype, sharding=placement(config.model, mesh))
    model = config.model.replace(image_token_id=bundle.config.image_token_id)
    if bundle.config.vision != model.vision or bundle.config.text != model.text:
        raise UserError(f"{out / BAD_MODEL}: holds another network than the configuration; give that of the run.")
    features = model.vision.patch_features if batch.images is None else batch.images.patches.shape[-1]
    if features != model.vision.patch_features:
        raise UserError(f"{out / BAD_BATCH}: a patch has {features} features, expected {model.vision.patch_features}.")

    @jax.jit
    def measure(params, batch):
        trained, frozen = partition(params, trainable(config.optimizer))

        def mean(trained):
            total, weight, _ = loss_sums(combine(trained, frozen), model, batch, mesh=mesh)
            return total / jnp.maximum(weight, 1.0)

        loss, grads = jax.value_and_grad(mean)(trained)
        return loss, jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)), grads)

    def run(batch: Batch) -> tuple[float, list[str]]:
        loss, finite = measure(bundle.params, batch if mesh is None else jax.device_put(batch, batch_sharding(mesh)))
        flat, _ = jax.tree_util.tree_flatten_with_path(finite)
        return float(loss), [path_name(path) for path, fine in flat if not fine]

    def alone(row: int) -> Batch:  # repeated: the same shape, hence the same program on the same mesh
        return jax.tree.map(lambda x: np.broadcast_to(x[row], x.shape), batch)

    loss, gradients = run(batch)
    by_row = [run(alone(row)) for row in range(len(batch.tokens))]
    bad = [row for row, (own, names) in enumerate(by_row) if names or not math.isfinite(own)]
    return {"loss": loss, "rows": bad, "gradients": gradients}
