"""How long an example is, in the tokens of a model: the counts that `render_long` fills to."""

import math
from collections.abc import Sequence

from andesvl_jax.data.examples import Example, Turn, messages_of
from andesvl_jax.data.long_context.layout import Count, Sketch
from andesvl_jax.inputs.chat import render_prompt, render_training
from andesvl_jax.inputs.image import ImageProcessor, plan_size
from andesvl_jax.inputs.tokenizer import Tokenizer

LEAST_SCALE = 0.99  # below it a picture is shrunk, and what stands on it becomes smaller than a token


def conversation_tokens(tokenizer: Tokenizer, processor: ImageProcessor) -> Count:
    """Tokens of the whole conversation, all its questions and answers: what a row of a training batch has to hold."""

    def count(sketch: Sketch) -> float:
        visual = _visual_tokens(sketch, processor)
        return math.inf if visual is None else len(render_training(_messages(sketch, sketch.turns), tokenizer, visual)[0])

    return count


def prompt_tokens(tokenizer: Tokenizer, processor: ImageProcessor) -> Count:
    """Tokens of the prompt with the longest question, each question asked alone: what evaluation prefills."""

    def count(sketch: Sketch) -> float:
        visual = _visual_tokens(sketch, processor)
        longest = max(sketch.turns, key=lambda turn: len(tokenizer.encode(turn.question)))
        return math.inf if visual is None else len(render_prompt(_messages(sketch, [longest])[:1], tokenizer, visual))

    return count


def _visual_tokens(sketch: Sketch, processor: ImageProcessor) -> list[int] | None:
    """Of each picture; None if the processor would shrink one."""
    for width, height in sketch.sizes:
        new = plan_size(width, height, processor).new
        if min(new[0] / width, new[1] / height) < LEAST_SCALE:
            return None
    return [processor.visual_tokens(width, height) for width, height in sketch.sizes]


def _messages(sketch: Sketch, turns: Sequence[Turn]):
    return messages_of(Example((None,) * len(sketch.sizes), tuple(turns), sketch.content, sketch.context))
