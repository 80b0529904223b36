"""A dense checkpoint and a recipe -> a packed checkpoint."""

import os
import runpy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from andesvl_jax.checkpoints.hf import load, save
from andesvl_jax.compression.accounting import describe_checkpoint
from andesvl_jax.errors import UserError
from andesvl_jax.weights import Recipe, represent


def load_recipe(file: str | os.PathLike) -> Recipe:
    """What a recipe file's `get_recipe()` returns.

    Raises:
      UserError: no such file, or one without that function.
    """
    if not Path(file).is_file():
        raise UserError(f"{file}: no such recipe file, expected one such as configs/compress/w8.py.")
    make = runpy.run_path(str(file)).get("get_recipe")
    recipe = make() if callable(make) else None
    if not isinstance(recipe, Recipe):
        raise UserError(f"{file}: has no get_recipe(), expected a function that returns a Recipe.")
    return recipe


def compress(model: str, recipe_file: str | os.PathLike, out: str | os.PathLike) -> dict[str, Any]:
    """Writes the model packed by a recipe, round to nearest, as a checkpoint directory.

    Returns:
      {recipe, out, bytes_on_disk, bpw_body, bpw_all, seconds}, see `compression.accounting`.
    Raises:
      UserError: a model that is packed already, a recipe that does not fit it, or a disk that refuses; `out` is then untouched.
    """
    began = time.perf_counter()
    recipe = load_recipe(recipe_file)
    bundle = load(model)
    if bundle.recipe is not None:
        raise UserError(f"{model}: its weights are packed already, expected a dense model.")
    packed = jax.block_until_ready(represent(bundle.params, recipe))
    save(replace(bundle, params=packed, recipe=recipe), out)
    found = describe_checkpoint(str(out))
    keys = ("bytes_on_disk", "bpw_body", "bpw_all")
    seconds = time.perf_counter() - began
    return {"recipe": str(recipe_file), "out": str(out)} | {key: found[key] for key in keys} | {"seconds": seconds}
