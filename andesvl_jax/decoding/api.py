"""`chat` and `generate`: from messages or token ids and pictures to an answer."""

from dataclasses import dataclass
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from andesvl_jax.cache.eviction import Eviction
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.decoding.sampling import sampling_options
from andesvl_jax.decoding.session import Session
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.chat import Message, images_of, render_prompt, without_marks
from andesvl_jax.inputs.image import ImageSource, Patches, prepare_image
from andesvl_jax.inputs.packing import Sample, make_sample

# name -> kinds of number, what every row's value must be, in code and in words
SAMPLING_OPTIONS = {
    "temperature": ("iuf", lambda x: (0 <= x) & np.isfinite(x), "0 (greedy) or more"),
    "top_k": ("iu", lambda x: (0 <= x) & (x < 2**31), "0 (all) or more"),
    "top_p": ("iuf", lambda x: (0 < x) & (x <= 1), "above 0 and at most 1"),
    "repetition_penalty": ("iuf", lambda x: (0 < x) & np.isfinite(x), "above 0"),
    "presence_penalty": ("iuf", np.isfinite, "a finite number"),
    "seed": ("iu", lambda x: (-(2**31) <= x) & (x < 2**31), "a 32-bit integer"),
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
    bundle: Bundle,
    samples: Sequence[Sample],
    max_new_tokens: int,
    temperature=0.0,
    stop_ids: Sequence[int] | None = None,
    kv_policy: str | None = None,
    kv_budget: float | int = 0.5,
    chunk: int | None = None,
    session: Session | None = None,
    **options: Any,
) -> Iterator[Answer]:
    """Generates for a batch of prompts; yields what stands after every `chunk` tokens. Options as in `generate`.

    A sampling option is one number for all rows or one per row; a single seed s gives row b the seed s + b. What a row
    generates depends on nothing but the row: neither padding nor the other rows change it.

    Args:
      session: of one row, whose cache serves what the prompt shares with it; it then holds the prompt and the answer.
    Raises:
      UserError: an option that is unknown or out of range, or a prompt beyond the model's positions.
    """
    config = bundle.config
    if temperature is None:
        options = _configured_sampling(bundle) | options
    else:
        options["temperature"] = temperature
    _check_options(options, len(samples))
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected at least 1.")
    longest = max(len(s.tokens) for s in samples)
    if longest + max_new_tokens > config.text.max_position_embeddings:
        raise UserError(
            f"the prompt has {longest} tokens and {max_new_tokens} are to follow, expected at most "
            f"{config.text.max_position_embeddings} together (max_position_embeddings)."
        )
    eviction = None if kv_policy is None else Eviction(kv_policy, kv_budget)
    sampling = sampling_options(len(samples), **options)
    stops = bundle.stop_ids if stop_ids is None else tuple(stop_ids)
    if session is None:
        session = Session(bundle, observe=0 if eviction is None else eviction.window)
        session.extend(samples)
    else:
        _follow(session, bundle, samples)
    if eviction is not None:
        session.evict(eviction)
    for ids in session.generate(sampling, max_new_tokens, stops, chunk):
        yield Answer(ids, session.kv_bytes, session.kv_slots)


def _follow(session: Session, bundle: Bundle, samples: Sequence[Sample]) -> None:
    if session.bundle is not bundle:
        raise UserError("session: found one of another model, expected Session(bundle) of the model that is asked.")
    if len(samples) != 1:
        raise UserError(f"session: found {len(samples)} conversations, expected one.")
    session.follow(samples[0])


def _configured_sampling(bundle: Bundle) -> dict[str, Any]:
    """What generation_config.json asks for; absent fields as `transformers` fills them, null ones as neutral."""
    absent = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    neutral = absent | {"top_k": 0}
    found = {name: bundle.generation_config.get(name, value) for name, value in absent.items()}
    found = {name: neutral[name] if value is None else value for name, value in found.items()}
    if not bundle.generation_config.get("do_sample", False):
        found = {"temperature": 0.0, "repetition_penalty": found["repetition_penalty"]}
    try:
        _check_options(found, 1)
    except UserError as error:
        raise UserError(f"generation_config.json: {error}") from error
    return found


def _check_options(options: dict[str, Any], rows: int) -> None:
    for name, value in options.items():
        if name not in SAMPLING_OPTIONS:
            raise UserError(f"decoding option {name!r} is unknown, expected one of {', '.join(SAMPLING_OPTIONS)}.")
        kinds, holds, expected = SAMPLING_OPTIONS[name]
        try:
            values = np.asarray(value)
        except ValueError:  # ragged
            values = np.asarray(None)
        if values.dtype.kind not in kinds or not np.all(holds(values)):
            raise UserError(f"{name} is {value!r}, expected {expected}.")
        if values.shape not in ((), (rows,)):
            raise UserError(f"{name} has shape {list(values.shape)}, expected one number or one for each of the {rows} rows.")


def generate(
    bundle: Bundle, input_ids: Sequence[int], images: Sequence[ImageSource] = (), max_new_tokens: int = 16,
    temperature: float | None = 0.0, stop_ids: Sequence[int] | None = None, **decoding_options: Any,
) -> np.ndarray:  # fmt: skip
    """New tokens for one prompt, int32 [n].

    Args:
      input_ids: prompt; the positions equal to `config.image_token_id` are filled with the pictures' visual tokens in order.
      temperature: 0 is greedy; None takes temperature, top_k, top_p and repetition_penalty from the checkpoint's
        generation_config.json, where decoding_options do not give them.
      stop_ids: None takes the generation config's, () never stops; the stop id is returned.
      decoding_options: kv_policy, kv_budget, seed, top_k, top_p, repetition_penalty, presence_penalty, session.
    """
    sample = prompt_sample(bundle, input_ids, images)
    *_, answer = stream(bundle, [sample], max_new_tokens, temperature, stop_ids, **decoding_options)
    return answer.ids[0]


def chat_sample(bundle: Bundle, messages: Sequence[Message], images: Sequence[ImageSource] = (), thinking=False) -> Sample:
    """Messages -> the prompt in the released format, with its pictures prepared.

    `images` fill the `<image>` marks of string contents; without any, an `<image>` in a string is text like any other.
    """
    if bundle.tokenizer is None:
        raise UserError("the checkpoint has no tokenizer, expected tokenizer.json or merges.txt; use generate with ids.")
    if len(messages) == 0:
        raise UserError("messages: found none, expected at least one.")
    if len(images) == 0 and not isinstance(messages, (str, Mapping)):
        messages = without_marks(messages)
    prepared = [prepare_image(image, bundle.image_processor) for image in images_of(messages, images)]
    ids = render_prompt(messages, bundle.tokenizer, [p.visual_tokens for p in prepared], thinking)
    return prompt_sample(bundle, ids, prepared)


def chat(
    bundle: Bundle, messages: Sequence[Message] | Sequence[Sequence[Message]], max_new_tokens: int = 256,
    temperature: float | None = 0.0, thinking: bool = False, images: Sequence = (), **decoding_options: Any,
) -> str | list[str]:  # fmt: skip
    """The assistant's next turn as text, or a list of them for a list of conversations, generated as one batch.

    Args:
      messages: [{"role", "content"}], or a list of such lists; content is a string, or a list of {"type": "text", "text"} and
        {"type": "image", "image": array, PIL image or path}. Text cannot add a picture, a turn or another control token.
      temperature: as in `generate`; None samples as the checkpoint's generation_config.json says.
      thinking: starts the answer with `<think>` and returns it in front; `inputs.chat.parse_thinking` takes it apart.
      images: pictures for the `<image>` marks of string contents, in order (for several conversations one list each); without
        any, an `<image>` in a string is text like any other.
      decoding_options: as in `generate`; sampling options may be one number per conversation. With session=Session(bundle) the
        next call costs only what is new in its messages.
    Raises:
      UserError: a malformed message, an unusable picture, or as `generate` does; in a batch it names the conversation.
    """
    batched = len(messages) > 0 and isinstance(messages, (list, tuple)) and isinstance(messages[0], (list, tuple))
    if not batched:
        samples = [chat_sample(bundle, messages, images, thinking)]
    else:
        if len(images) not in (0, len(messages)):
            raise UserError(
                f"images has {len(images)} entries, expected one list of pictures for each of the {len(messages)} conversations."
            )
        samples = []
        for number, (conversation, pictures) in enumerate(
            zip(messages, images if len(images) else [()] * len(messages)), start=1
        ):
            try:
                samples.append(chat_sample(bundle, conversation, pictures, thinking))
            except UserError as error:
                raise UserError(f"conversation {number}: {error}") from error
    *_, answer = stream(bundle, samples, max_new_tokens, temperature, **decoding_options)
    texts = [("<think>" if thinking else "") + bundle.tokenizer.decode(ids) for ids in answer.ids]
    return texts if batched else texts[0]
