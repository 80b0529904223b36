"""How well a model predicts a text: the usual measure of what quantization, eviction or sparsity cost a language model."""

import functools
import hashlib
import math
from collections.abc import Iterable

import jax
import numpy as np
from tqdm import tqdm

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.packing import Budget, assemble, make_sample
from andesvl_jax.model.andesvl import forward
from andesvl_jax.training.objectives import cross_entropy


def perplexity(bundle: Bundle, texts: Iterable[str], window: int = 512, most: int = 50_000) -> dict[str, float | int | str]:
    """Of the first `most` tokens of the texts, in windows of `window` tokens that do not see each other; added tokens are text.

    Returns:
      perplexity, e to the mean cross-entropy of a token; bits_per_byte, its sum over the bytes predicted, which compares models
      with different vocabularies; tokens, how many were predicted; sha256 of the text they are from.
    Raises:
      UserError: no tokenizer, or less text than two windows.
    """
    if bundle.tokenizer is None:
        raise UserError("perplexity: the model has no tokenizer.json, expected one.")
    whole = "\n\n".join(texts)
    ids = bundle.tokenizer.encode(whole)[:most]
    windows = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
    if len(windows) < 2:
        raise UserError(f"perplexity: the text has {len(ids)} tokens, expected at least {2 * window}, two windows.")
    loss = jax.jit(functools.partial(_loss, config=bundle.decoding_config))
    budget, seen = Budget(rows=1, tokens=window, patches=0, targets=window - 1), [True] * window
    total = 0.0
    for part in tqdm(windows, unit="window", leave=False, disable=None):
        sample = make_sample(part, seen, [], bundle.config.image_token_id)
        total += float(loss(bundle.decoding_params, batch=assemble([[sample]], budget, bundle.config.vision.patch_features)))
    tokens = len(windows) * (window - 1)
    size = sum(len(bundle.tokenizer.decode(part[1:]).encode()) for part in windows)
    return {
        "perplexity": math.exp(total / tokens),
        "bits_per_byte": total / math.log(2) / size,
        "tokens": tokens,
        "sha256": hashlib.sha256(whole.encode()).hexdigest(),
    }


def _loss(params, batch, config) -> jax.Array:
    hidden = forward(params, config, batch)
    weights = np.float32(1) * (batch.target_slots >= 0)
    return cross_entropy(params, hidden, batch.target_slots, batch.targets, weights)[0]
