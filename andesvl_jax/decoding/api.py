"""`chat` and `generate`: from messages or token ids and pictures to an answer."""

from dataclasses import dataclass
from typing import Any, Iterator, Sequence

import numpy as np

from andesvl_jax.cache.eviction import Eviction
from andesvl_jax.cache.kv import cache_bytes
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.decoding.generate import new_tokens_of, run
from andesvl_jax.decoding.sampling import sampling_options
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.chat import images_of, render_prompt
from andesvl_jax.inputs.image import ImageSource, Patches, prepare_image
from andesvl_jax.inputs.packing import Sample, assemble_prompts, make_sample

# name -> what every row's value must be, in code and in words
SAMPLING_OPTIONS = {
    "temperature": (lambda x: (0 <= x) & np.isfinite(x), "0 (greedy) or more"),
    "top_k": (lambda x: (0 <= x) & (x < 2**31), "0 (all) or more"),
    "top_p": (lambda x: (0 < x) & (x <= 1), "above 0 and at most 1"),
    "repetition_penalty": (lambda x: (0 < x) & np.isfinite(x), "above 0"),
    "presence_penalty": (np.isfinite, "a finite number"),
    "seed": (lambda x: (-(2**31) <= x) & (x < 2**31), "a 32-bit integer"),
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What generation has produced so far. ids: int32 [n] per row, stop id included; cache sizes as allocated."""

    ids: list[np.ndarray]
    kv_bytes: int
    kv_slots: int


def prompt_sample(bundle: Bundle, ids: Sequence[int], images: Sequence[ImageSource | Patches]) -> Sample:
    """Token ids and pictures of one prompt -> Sample. Raises UserError when slots and pictures do not fit together."""
    config = bundle.config
    if config.image_token_id is None and len(images):
        raise UserError("image_token_id is unknown, expected a tokenizer beside the weights or load(..., image_token_id=...).")
    ids = np.asarray(ids)
    whole = ids.ndim == 1 and ids.size > 0 and np.issubdtype(ids.dtype, np.integer)
    if not whole or ids.min() < 0 or ids.max() >= config.text.vocab_size:
        raise UserError(
            f"input_ids is {ids.dtype} of shape {ids.shape}, expected at least one id, whole numbers from 0 to "
            f"{config.text.vocab_size - 1} in one row."
        )
    prepared = [image if isinstance(image, Patches) else prepare_image(image, bundle.image_processor) for image in images]
    return make_sample(ids, np.zeros(len(ids), bool), prepared, -1 if config.image_token_id is None else config.image_token_id)


def stream(
    bundle: Bundle, samples: Sequence[Sample], max_new_tokens: int, temperature=0.0, stop_ids: tuple[int, ...] | None = None,
    kv_policy: str | None = None, kv_budget: float | int = 0.5, chunk: int | None = None, **options: Any,
) -> Iterator[Answer]:  # fmt: skip
    """Generates for a batch of prompts; yields what stands after every `chunk` tokens. Options as in `generate`.

    Raises:
      UserError: an option that is unknown or out of range, or a prompt beyond the model's positions.
    """
    config = bundle.config
    _check_options({"temperature": temperature, **options})
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected at least 1.")
    longest = max(len(s.tokens) for s in samples)
    if longest + max_new_tokens > config.text.max_position_embeddings:
        raise UserError(
            f"the prompt has {longest} tokens and {max_new_tokens} are to follow, expected at most "
            f"{config.text.max_position_embeddings} together (max_position_embeddings)."
        )
    eviction = None if kv_policy is None else Eviction(kv_policy, kv_budget)
    batch = assemble_prompts(samples, config.vision.patch_features)
    sampling = sampling_options(len(samples), temperature, **options)
    stops = bundle.stop_ids if stop_ids is None else tuple(stop_ids)
    for state in run(bundle.decoding_params, config, batch, sampling, max_new_tokens, stops, eviction, chunk):
        yield Answer(new_tokens_of(state), cache_bytes(state.cache), state.cache.slots)


def _check_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in SAMPLING_OPTIONS:
            raise UserError(f"decoding option {name!r} is unknown, expected one of {', '.join(SAMPLING_OPTIONS)}.")
        holds, expected = SAMPLING_OPTIONS[name]
        if not np.all(holds(np.asarray(value))):
            raise UserError(f"{name} is {value}, expected {expected}.")


def generate(
    bundle: Bundle, input_ids: Sequence[int], images: Sequence[ImageSource] = (), max_new_tokens: int = 16,
    temperature: float = 0.0, stop_ids: Sequence[int] | None = None, **decoding_options: Any,
) -> np.ndarray:  # fmt: skip
    """New tokens for one prompt, int32 [n].

    Args:
      input_ids: prompt; the positions equal to `config.image_token_id` are filled with the pictures' visual tokens in order.
      temperature: 0 is greedy. stop_ids: None takes the generation config's, () never stops; the stop id is returned.
      decoding_options: kv_policy, kv_budget, seed, top_k, top_p, repetition_penalty, presence_penalty.
    """
    sample = prompt_sample(bundle, input_ids, images)
    stops = None if stop_ids is None else tuple(stop_ids)
    *_, answer = stream(bundle, [sample], max_new_tokens, temperature, stops, **decoding_options)
    return answer.ids[0]


def chat_sample(bundle: Bundle, messages: Sequence[dict[str, Any]], images: Sequence[ImageSource] = (), thinking=False) -> Sample:
    """Messages -> the prompt of `spec` form with its pictures prepared; `images` fill `<image>` marks of string contents."""
    if bundle.tokenizer is None:
        raise UserError("the checkpoint has no tokenizer, expected tokenizer.json or merges.txt; use generate with ids.")
    prepared = [prepare_image(image, bundle.image_processor) for image in images_of(messages, images)]
    ids = render_prompt(messages, bundle.tokenizer, [p.visual_tokens for p in prepared], thinking)
    return prompt_sample(bundle, ids, prepared)


def chat(
    bundle: Bundle, messages: Sequence[dict[str, Any]], max_new_tokens: int = 256, temperature: float = 0.0,
    thinking: bool = False, images: Sequence[ImageSource] = (), **decoding_options: Any,
) -> str:  # fmt: skip
    """The assistant's next turn as text.

    Args:
      messages: [{"role", "content"}]; content is a string, or a list of {"type": "text", "text"} and
        {"type": "image", "image": array, PIL image or path}. In a string `<image>` marks the place of one of `images`.
      thinking: starts the answer with `<think>` and returns it in front.
    """
    sample = chat_sample(bundle, messages, images, thinking)
    *_, answer = stream(bundle, [sample], max_new_tokens, temperature, **decoding_options)
    return ("<think>" if thinking else "") + bundle.tokenizer.decode(answer.ids[0])
