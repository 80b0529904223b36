"""The prompt format of the released model code: turns to ids, images to runs of placeholders, answers back to parts.

Each turn is `<|im_start|>{role}\n{content}<|im_end|>\n`; an image is `<img>`, one `<|vision_pad|>` per visual token, `</img>`.
There is no default system turn and no separator between content items. Which special tokens a text may write depends on its
role, so that text from outside can neither open a turn nor add an image.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from andesvl_jax.errors import UserError
from andesvl_jax.inputs.tokenizer import ADDED_TOKENS, Tokenizer

Message = Mapping[str, Any]

IMAGE_MARK = "<image>"  # the place of an image in a plain-string content
REFERENCE_TOKENS = frozenset(
    ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>")
)
STRUCTURE_TOKENS = frozenset(
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
)
_TRUSTED_TOKENS = frozenset(name for name, _ in ADDED_TOKENS) - STRUCTURE_TOKENS
# Users may point at places (GUI referring); system and assistant text may also hold reasoning and tool-call markup.
ROLE_TOKENS = {"user": REFERENCE_TOKENS, "system": _TRUSTED_TOKENS, "assistant": _TRUSTED_TOKENS}


def render_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, visual_tokens: Sequence[int], thinking: bool = False
) -> list[int]:
    """Ids of a conversation that the assistant is to continue.

    Args:
      messages: `{"role": "user" | "assistant" | "system", "content": ...}`, the content a string, in which every `<image>` is
        the place of an image, or a list of `{"type": "text", "text": str}` (taken literally), `{"type": "image", ...}` and
        `{"type": "image_url", ...}`. `without_marks` makes strings literal too.
      visual_tokens: visual tokens of each image, in order of appearance.
      thinking: opens the answer with `<think>`.
    Raises:
      UserError: a malformed message, or more or fewer images in the messages than in `visual_tokens`.
    """
    ids: list[int] = []
    for role, parts, slots in _placed(messages, visual_tokens):
        ids += _open_turn(role, parts, slots, tokenizer)
        ids += _end_of_turn(tokenizer)
    ids += _header(tokenizer, "assistant")
    if thinking:
        ids.append(tokenizer.token_id("<think>"))
    return ids


def render_training(
    messages: Sequence[Message], tokenizer: Tokenizer, visual_tokens: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """Ids of a whole conversation and which of them are learned: the assistant's answers with the `<|im_end|>` that ends them.

    Arguments and errors as `render_prompt`. An answer is encoded apart from its header, as it is generated; a prompt encodes
    both as one text, which differs only for an answer that begins with white space. Placeholders of images are never learned.
    """
    ids: list[int] = []
    supervised: list[bool] = []
    for role, parts, slots in _placed(messages, visual_tokens):
        if role == "assistant":
            ids += _header(tokenizer, role)
            supervised += [False] * (len(ids) - len(supervised))
            for part in parts:
                ids += _image(next(slots), tokenizer) if part is None else tokenizer.encode(part, ROLE_TOKENS[role])
                supervised += [part is not None] * (len(ids) - len(supervised))
        else:
            ids += _open_turn(role, parts, slots, tokenizer)
            supervised += [False] * (len(ids) - len(supervised))
        ids += _end_of_turn(tokenizer)
        supervised.append(role == "assistant")
        supervised += [False] * (len(ids) - len(supervised))
    return ids, supervised


def images_of(messages: Sequence[Message], marked: Sequence[Any] = ()) -> list[Any]:
    """The images of a conversation in order of appearance, as `visual_tokens` has to list them.

    Args:
      messages: as for `render_prompt`; an image item holds its picture as `{"type": "image", "image": X}` or as
        `{"type": "image_url", "image_url": {"url": path, "detail": "low"}}`.
      marked: the images of the `<image>` marks in plain-string contents, in order.
    Raises:
      UserError: a malformed message, a URL that is not a local path, or more or fewer marks than `marked` images.
    """
    images: list[Any] = []
    remaining = iter(marked)
    marks = 0
    for number, message in enumerate(messages, start=1):
        role, content = _checked(message, number)
        if isinstance(content, str):
            found = content.count(IMAGE_MARK)
            marks += found
            images += itertools.islice(remaining, found)
        else:
            images += [_image_of(item, number) for item in content if item["type"] != "text"]
    if marks != len(marked):
        raise UserError(_count_message(f"{marks} {IMAGE_MARK} marks", marks, len(marked)))
    return images


def _placed(messages: Sequence[Message], visual_tokens: Sequence[int]) -> list[tuple[str, list[str | None], Iterator[int]]]:
    """(role, content parts, image sizes) of each message; a part is a run of text, or None for an image."""
    if isinstance(messages, (str, Mapping)):
        raise UserError(f"messages: found a {type(messages).__name__}, expected a list of messages.")
    turns = []
    for number, message in enumerate(messages, start=1):
        role, content = _checked(message, number)
        turns.append((role, _parts(content)))
    places = sum(part is None for _, parts in turns for part in parts)
    if places != len(visual_tokens):
        raise UserError(_count_message(f"{places} {IMAGE_MARK} marks or image items", places, len(visual_tokens)))
    for count in visual_tokens:
        if count < 1:
            raise UserError(f"visual_tokens: found {count}, expected at least 1 token per image.")
    slots = iter(visual_tokens)
    return [(role, parts, slots) for role, parts in turns]


def _count_message(found: str, places: int, images: int) -> str:
    if places == 1:
        found = found.replace("marks", "mark").replace("items", "item")
    was = "1 image was" if images == 1 else f"{images} images were"
    return (
        f"prompt has {found} but {was} given; expected one image for each, and an {IMAGE_MARK} meant as text in a "
        'content list as {"type": "text", ...}.'
    )


def _parts(content: str | list[Mapping[str, Any]]) -> list[str | None]:
    if isinstance(content, str):
        texts = content.split(IMAGE_MARK)
        pieces = [texts[0]]
        for text in texts[1:]:
            pieces += [None, text]
    else:
        pieces = [item["text"] if item["type"] == "text" else None for item in content]
    parts: list[str | None] = []
    for piece in pieces:
        if piece and parts and parts[-1] is not None:
            parts[-1] += piece  # neighbouring texts are one text to the tokenizer
        elif piece != "":
            parts.append(piece)
    return parts


def _open_turn(role: str, parts: list[str | None], slots: Iterator[int], tokenizer: Tokenizer) -> list[int]:
    """Ids from `<|im_start|>` to the end of the content. `slots` yields the visual tokens of the next image."""
    allowed = ROLE_TOKENS[role]
    if parts and parts[0] is not None and parts[0][0].isspace():  # its line breaks join the header's in one token
        ids = [tokenizer.im_start_id, *tokenizer.encode(f"{role}\n{parts[0]}", allowed)]
        parts = parts[1:]
    else:
        ids = list(_header(tokenizer, role))
    for part in parts:
        ids += _image(next(slots), tokenizer) if part is None else tokenizer.encode(part, allowed)
    return ids


def _image(count: int, tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.image_start_id, *[tokenizer.image_token_id] * count, tokenizer.image_end_id]


@functools.lru_cache(maxsize=64)
def _header(tokenizer: Tokenizer, role: str) -> tuple[int, ...]:
    return tokenizer.im_start_id, *tokenizer.encode(f"{role}\n")


@functools.lru_cache(maxsize=16)
def _end_of_turn(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tokenizer.im_end_id, *tokenizer.encode("\n")


def _checked(message: Message, number: int) -> tuple[str, str | list[Mapping[str, Any]]]:
    """(role, content) of a message. Raises UserError naming the message, counted from 1."""
    if not isinstance(message, Mapping):
        raise UserError(f"message {number}: found a {type(message).__name__}, expected an object with role and content.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLE_TOKENS:
        raise UserError(f"message {number}: role is {role!r}, expected one of {', '.join(ROLE_TOKENS)}.")
    if isinstance(content, str):
        return role, content
    if not isinstance(content, (list, tuple)):
        raise UserError(f"message {number}: content is a {type(content).__name__}, expected a string or a list of items.")
    for item in content:
        _check_item(item, number)
    return role, content


def _check_item(item: Any, number: int) -> None:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind not in ("text", "image", "image_url"):
        raise UserError(f"message {number}: content item has type {kind!r}, expected 'text', 'image' or 'image_url'.")
    if kind == "text" and not isinstance(item.get("text"), str):
        raise UserError(f"message {number}: text item has no text, expected a string under 'text'.")
    if kind == "image_url":
        url = item.get("image_url")
        detail = url.get("detail", "low") if isinstance(url, Mapping) else None
        if detail != "low":
            raise UserError(f"message {number}: image_url.detail is {detail!r}, expected 'low' in an object with 'url'.")


def _image_of(item: Mapping[str, Any], number: int) -> Any:
    image = item.get("image") if item["type"] == "image" else item["image_url"].get("url")
    if image is None:
        raise UserError(f"message {number}: {item['type']} item has no picture, expected an array, a PIL image or a path.")
    if isinstance(image, str) and ("://" in image or image.startswith("data:")):
        raise UserError(f"message {number}: image is the URL {image[:80]!r}, expected a local path; nothing is downloaded.")
    return image


def without_marks(messages: Sequence[Message]) -> list[Message]:
    """The messages with every string content taken literally: an `<image>` in it is text and makes no place for an image."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message, Mapping) and isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def without_reasoning(messages: Sequence[Message]) -> list[Message]:
    """The messages without the reasoning of the answers before the last user turn, as Qwen3's chat template drops it.

    The released model code, and with it `render_prompt`, keeps what it is given. Raises UserError for a malformed message.
    """
    turns = [_checked(message, number) for number, message in enumerate(messages, start=1)]
    last = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=-1)
    return [
        {**message, "content": _after_reasoning(content)} if role == "assistant" and i < last else message
        for i, (message, (role, content)) in enumerate(zip(messages, turns, strict=True))
    ]


def _after_reasoning(content: str | list[Mapping[str, Any]]) -> str | list[Mapping[str, Any]]:
    if isinstance(content, str):
        return content.rpartition("</think>")[2].lstrip("\n") if "</think>" in content else content
    ends = [i for i, item in enumerate(content) if item["type"] == "text" and "</think>" in item["text"]]
    if not ends:
        return content
    first = content[ends[-1]]
    return [{**first, "text": _after_reasoning(first["text"])}, *content[ends[-1] + 1 :]]


def parse_thinking(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a generated text, stripped of white space.

    The reasoning ends at the last `</think>`; the `<think>` that opens it may be missing, because it can be part of the
    prompt. Reasoning that was cut off before its `</think>` leaves the answer empty.
    """
    reasoning, mark, answer = text.rpartition("</think>")
    opened = text.lstrip().startswith("<think>")
    if not mark:
        reasoning, answer = (text, "") if opened else ("", text)
    return reasoning.strip().removeprefix("<think>").strip(), answer.strip()


def boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` of a LaTeX text, braces balanced and escaped ones not counted; None if none."""
    open_braces: list[tuple[int, bool]] = []  # (start of the content, whether \boxed opened it)
    last = (-1, -1)
    for mark in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if mark[0].endswith("{") and mark[0] != r"\{":
            open_braces.append((mark.end(), mark[0] != "{"))
        elif mark[0] == "}" and open_braces:
            start, is_boxed = open_braces.pop()
            if is_boxed and start > last[0]:
                last = (start, mark.start())
    return text[last[0] : last[1]].strip() if last[0] >= 0 else None
