"""What a checkpoint directory holds, as one value."""

import functools
from dataclasses import dataclass, field
from typing import Any

from andesvl_jax.config import AndesVLConfig
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.tokenizer import Tokenizer
from andesvl_jax.model.andesvl import AndesVL, for_decoding
from andesvl_jax.weights import Recipe

# generation_config.json of the releases, where a directory has none
RELEASED_GENERATION = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


@dataclass(frozen=True)
class Bundle:
    config: AndesVLConfig
    params: AndesVL
    tokenizer: Tokenizer | None
    image_processor: ImageProcessor
    generation_config: dict[str, Any] = field(default_factory=lambda: dict(RELEASED_GENERATION))
    recipe: Recipe | None = None  # of packed weights

    @functools.cached_property
    def _decoding(self) -> tuple[AndesVL, AndesVLConfig]:
        return for_decoding(self.params, self.config)

    @property
    def decoding_params(self) -> AndesVL:
        """The parameters in the form that decodes fastest on this backend, made once; they go with `decoding_config`."""
        return self._decoding[0]

    @property
    def decoding_config(self) -> AndesVLConfig:
        """The config that describes `decoding_params`."""
        return self._decoding[1]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`eos_token_id` of the generation config; the tokenizer's end of turn where it names none.

        Raises UserError where it is neither a token id nor a list of them.
        """
        eos = self.generation_config.get("eos_token_id")
        if eos is None:
            return () if self.tokenizer is None else (self.tokenizer.im_end_id,)
        ids = tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise UserError(f"generation_config.json: eos_token_id is {eos!r}, expected a token id or a list of them.")
        return ids
