"""Long-context tasks: solvers that read nothing but the rendered text and pixels answer every question; lengths are kept."""

import dataclasses
import functools
import re
import tempfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from andesvl_jax.data.corpus import corpus, train_tokenizer
from andesvl_jax.data.drawing import COLOURS, FONTS, SHAPES, TOKEN_SIDE, shape_mask
from andesvl_jax.data.examples import Example, in_validation, messages_of
from andesvl_jax.data.long_context.length import conversation_tokens, prompt_tokens
from andesvl_jax.data.long_context.registry import LONG_TASKS, TEXT_TASKS, long_name, render_long
from andesvl_jax.data.mixture import Bad, Mixture, examples
from andesvl_jax.data.pipeline import samples_of, to_sample
from andesvl_jax.data.registry import SPLITS
from andesvl_jax.data.tasks_shapes import ANGLES
from andesvl_jax.data.tasks_text import SIZES, WORD_ALPHABET, character_mask
from andesvl_jax.errors import UserError
from andesvl_jax.evaluation.scorers import score
from andesvl_jax.inputs.chat import render_prompt
from andesvl_jax.inputs.image import ImageProcessor, prepare_image
from andesvl_jax.inputs.tokenizer import Tokenizer

SEED = 5
LENGTHS = (256, 512, 1024, 2048, 4096)
PROCESSOR = ImageProcessor(patch_size=14)


@functools.cache
def tokenizer() -> Tokenizer:
    """The demo's: byte-level BPE of 4,096 entries that never saw a text of these tasks."""
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(corpus(0), f"{folder}/tokenizer.json")
        return Tokenizer.load(folder)


@functools.cache
def some(family: str, split: str, tokens: int, number: int) -> tuple[Example, ...]:
    count = prompt_tokens(tokenizer(), PROCESSOR)
    return tuple(render_long(family, SEED, index, split, tokens, count) for index in range(number))


# Solvers: a few lines each, from the text of the context and the question alone.


def solve_code(context: str, question: str) -> str:
    key = re.search(r"(?:code of|codes of|code does|codes does) (.+?)(?: have)?[.?]$", question)[1]
    return ", ".join(re.findall(rf"^(?:The|One) code of {key} is (\d+)\.$", context, re.M))


def solve_list(context: str, question: str) -> str:
    pairs = [" ".join(pair) for pair in re.findall(r"^The code of (.+) is (\d+)\.$", context, re.M)]
    return ", ".join(pairs if "in the order" in question or "to the last" in question else reversed(pairs))


def solve_echo(context: str, question: str) -> str:
    """The one line that is no sentence."""
    (row,) = re.findall(r"^([a-z0-9]+(?: [a-z0-9]+)+)$", context, re.M)
    return " ".join(reversed(row.split())) if any(word in question for word in ("backwards", "its end", "the end")) else row


def solve_vt(context: str, question: str) -> str:
    target, values = re.search(r"\d+", question)[0], {}
    for name, value in re.findall(r"^Let (\w+) be (\w+)\.$", context, re.M):
        assert name not in values, "assigned twice"
        values[name] = value if value.isdigit() else values[value]  # a variable has its value when it is used
    return ", ".join(name for name, value in values.items() if value == target)


def solve_two_hop(context: str, question: str) -> str:
    (asked,) = re.findall(r"of ([A-Z]\w+ [A-Z]\w+)", question)
    friends = re.findall(r"^The friend of (.+) is (.+)\.$", context, re.M)
    homes = re.findall(r"^(.+) lives in (.+)\.$", context, re.M)
    assert len(dict(friends)) == len(friends) and len(dict(homes)) == len(homes), "one friend and one city each"
    return dict(homes)[dict(friends)[asked]]


def solve_common(context: str, question: str) -> str:
    number = re.search(r"list (\d+)", question)[1]
    words = Counter(re.search(rf"^List {number}: (.+)$", context, re.M)[1].split()).most_common()
    assert words[2][1] > words[3][1], "a tie at the boundary"
    first = [word for word, _ in words[:3]]
    if "the most frequent first" in question:
        assert words[0][1] > words[1][1] > words[2][1]
        return ", ".join(first)
    assert words[0][1] == words[2][1]
    return ", ".join(sorted(first))


def solve_dialogue(context: str, question: str) -> str:
    event = re.search(r"to the (\w+)", question)[1]
    brings = dict(re.findall(rf"^(\w+): (?:No, )?I bring the (\w+) to the {event}\.$", context, re.M))  # the last one stays
    return "; ".join(f"{who}: {thing}" for who, thing in sorted(brings.items()))


SOLVERS = {
    "niah_single": solve_code, "niah_multikey": solve_code, "niah_multivalue": solve_code, "vt": solve_vt,
    "recite": solve_list, "echo": solve_echo,
    "qa_two_hop": solve_two_hop, "cwe": solve_common, "fwe": solve_common, "dialogue": solve_dialogue,
}  # fmt: skip


@pytest.mark.parametrize(("tokens", "number"), [(256, 100), (1024, 40)])
@pytest.mark.parametrize("family", TEXT_TASKS)
def test_a_solver_that_reads_the_text_answers_every_question(family, tokens, number):
    for split in SPLITS:
        for example in some(family, split, tokens, number):
            for turn in example.turns:
                assert SOLVERS[family](example.context, turn.question) == turn.answer


def test_what_training_says_holds_the_answer_and_no_other_one():
    replied = set()
    for family in TEXT_TASKS:
        for example in some(family, "train", 256, 100):
            answers = [message["content"] for message in messages_of(example)[1::2]]
            for turn, said in zip(example.turns, answers, strict=True):
                assert score(family, said, turn.answer) == 1
                others = {other.answer for other in example.turns} - {turn.answer}
                if turn.reply:
                    replied.add(family)
                    assert said == turn.reply and not any(score(family, said, other) == 1 for other in others)
    assert replied == {"niah_single", "niah_multikey", "niah_multivalue", "qa_two_hop"}


@pytest.mark.parametrize("family", TEXT_TASKS)
def test_without_the_context_nothing_can_be_solved(family):
    answers = Counter(turn.answer for example in some(family, "train", 1024, 40) for turn in example.turns)
    assert answers.most_common(1)[0][1] / answers.total() < 0.1


def cells_of(image: np.ndarray) -> np.ndarray:
    """bool [rows, columns, 28, 28]: which pixels are unlike the background, token by token."""
    ink = np.abs(image.astype(int) - np.median(image, axis=(0, 1))).sum(2) > 120
    ink = np.pad(ink, ((0, 1), (0, 1)))
    rows, columns = (length // TOKEN_SIDE for length in ink.shape)
    return ink.reshape(rows, TOKEN_SIDE, columns, TOKEN_SIDE).swapaxes(1, 2)


@functools.cache
def letter_cells(font: str, size: int) -> np.ndarray:
    """bool [26, 28, 28]: the capitals, each in the middle of a token."""
    out = np.zeros((26, TOKEN_SIDE, TOKEN_SIDE), bool)
    for cell, letter in zip(out, WORD_ALPHABET, strict=True):
        mask = np.array(character_mask(letter, font, size, 0.0)) > 127
        y, x = ((TOKEN_SIDE - 1 - length) // 2 for length in mask.shape)
        cell[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
    return out


def spelled(line: np.ndarray, letters: np.ndarray) -> tuple[str, int]:
    """A line bool [columns, 28, 28] as text, and the number of pixels that are unlike the letters read."""
    unlike = (letters[None] ^ line[:, None]).sum((2, 3))
    written = line.any((1, 2))
    text = "".join(WORD_ALPHABET[i] if inked else " " for i, inked in zip(unlike.argmin(1), written, strict=True))
    return text.rstrip(), int(unlike.min(1)[written].sum())


@pytest.mark.parametrize(("tokens", "number"), [(256, 100), (1024, 5)])
def test_the_pixels_of_pages_say_what_the_answers_say(tokens, number):
    for split in SPLITS:
        for example in some("pages", split, tokens, number):
            pages = [cells_of(image) for image in example.images]
            styles = (letter_cells(font, size) for font in FONTS for size in SIZES)
            letters = min(styles, key=lambda style: sum(spelled(line, style)[1] for line in pages[0]))
            lines = [[spelled(line, letters)[0] for line in page] for page in pages]
            assert 2 <= len(pages) <= 8 and len(set(sum(lines, []))) == sum(map(len, lines)), "no line stands twice"
            for turn in example.turns:
                line, page = map(int, re.findall(r"\d+", turn.question))
                assert lines[page - 1][line - 1] == turn.answer


def small(mask: np.ndarray) -> np.ndarray:
    """A mask cropped to its ink, as float [16, 16]."""
    image = Image.fromarray(np.uint8(255 * mask))
    return np.asarray(image.crop(image.getbbox()).resize((16, 16)), float) / 255


@functools.cache
def shape_looks() -> list[tuple[str, np.ndarray]]:
    return [(shape, small(np.array(shape_mask(shape, 22, angle)) > 127)) for shape in SHAPES for angle in ANGLES]


def kinds_of(image: np.ndarray) -> set[tuple[str, str]]:
    """(colour, shape) of everything in a picture, from its pixels."""
    kinds = set()
    colours = np.pad(image, ((0, 1), (0, 1), (0, 0)))
    for (row, column), cell in ((place, cell) for place, cell in _each(cells_of(image)) if cell.sum() > 20):
        y, x = row * TOKEN_SIDE, column * TOKEN_SIDE
        shown = np.median(colours[y : y + TOKEN_SIDE, x : x + TOKEN_SIDE][cell], axis=0)
        colour = min(COLOURS, key=lambda name: np.abs(shown - COLOURS[name]).sum())
        look = small(cell)
        kinds.add((colour, min(shape_looks(), key=lambda known: np.abs(known[1] - look).sum())[0]))
    return kinds


def _each(cells: np.ndarray):
    return (((row, column), cells[row, column]) for row in range(len(cells)) for column in range(cells.shape[1]))


@pytest.mark.parametrize(("tokens", "number"), [(256, 100), (1024, 5)])
def test_the_pixels_of_one_picture_show_what_is_asked_and_others_something_like_it(tokens, number):
    for split in SPLITS:
        for example in some("which_picture", split, tokens, number):
            shown = [kinds_of(image) for image in example.images]
            assert 2 <= len(shown) <= 8
            for turn in example.turns:
                colour, shape = re.search(r"the (\w+) (\w+)[?.]", turn.question).groups()
                assert [str(i) for i, kinds in enumerate(shown, 1) if (colour, shape) in kinds] == [turn.answer]
                others = set().union(*(kinds for i, kinds in enumerate(shown, 1) if str(i) != turn.answer))
                assert any((kind[0] == colour) != (kind[1] == shape) for kind in others)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("family", LONG_TASKS)
def test_lengths_are_kept_as_the_model_counts_them(family, tokens):
    """Measured on the prompts and conversations themselves, pictures prepared."""
    whole = conversation_tokens(tokenizer(), PROCESSOR)
    for index, split in enumerate(SPLITS * (2 if family in TEXT_TASKS else 1)):
        example = render_long(family, SEED, index, split, tokens, prompt_tokens(tokenizer(), PROCESSOR))
        visual = [prepare_image(image, PROCESSOR).visual_tokens for image in example.images]
        pictures = messages_of(example)[0]["content"][:-1]
        texts = [{"type": "text", "text": example.context + turn.question} for turn in example.turns]
        prompts = [render_prompt([{"role": "user", "content": [*pictures, text]}], tokenizer(), visual) for text in texts]
        assert 0.95 * tokens <= max(map(len, prompts)) <= tokens
        conversation = to_sample(messages_of(render_long(family, SEED, index, split, tokens, whole)), tokenizer(), PROCESSOR)
        assert 0.95 * tokens <= len(conversation.tokens) <= tokens


@pytest.mark.parametrize("family", LONG_TASKS)
def test_an_example_is_a_pure_function_of_its_arguments(family):
    count = prompt_tokens(tokenizer(), PROCESSOR)
    first = [render_long(family, SEED, index, "train", 256, count) for index in range(8)]
    again = [render_long(family, SEED, index, "train", 256, count) for index in reversed(range(8))][::-1]
    for one, other in zip(first, again, strict=True):
        assert (one.context, one.turns, one.content) == (other.context, other.turns, other.content)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(one.images, other.images, strict=True))
    assert len({example.content for example in first}) == 8
    assert render_long(family, SEED + 1, 0, "train", 256, count).content != first[0].content


@pytest.mark.parametrize("family", LONG_TASKS)
def test_what_a_question_asks_belongs_to_one_split(family):
    facts = {}
    for split in SPLITS:
        contents = [example.content.removeprefix(f"{family} ") for example in some(family, split, 256, 100)]
        if family == "which_picture":  # its scenes as a whole
            facts[split] = {f"{family} {content}" for content in contents}
        else:
            facts[split] = {fact for content in contents for fact in content.split("; ")}
    assert all(map(in_validation, facts["validation"])) and not any(map(in_validation, facts["train"]))


def test_facts_that_are_not_asked_for_belong_to_the_split_too():
    for split in SPLITS:
        for example in some("niah_multikey", split, 1024, 40)[:20]:
            facts = re.findall(r"^The code of (.+) is (\d+)\.$", example.context, re.M)
            assert len(facts) > 20 and {in_validation(" ".join(fact)) for fact in facts} == {split == "validation"}


@pytest.mark.parametrize(
    "family", [family for family in LONG_TASKS if family not in ("echo", "recite")]
)  # which ask twice about all
def test_questions_of_a_context_are_about_different_places_spread_over_it(family):
    depths, questions = [], Counter()
    for example in some(family, "train", *((1024, 40) if family in TEXT_TASKS else (256, 100))):
        found = [depth for turn in example.turns for depth in turn.depths]
        assert len({turn.question for turn in example.turns}) == len(example.turns)
        assert family == "which_picture" or len(set(found)) == len(found)
        assert all(turn.depths and 0 <= min(turn.depths) and max(turn.depths) < 1 for turn in example.turns)
        depths += found
        questions[len(example.turns)] += 1
    assert set(questions) <= set(range(4, 9)) and len(questions) >= 3
    quarters = np.histogram(depths, 4, (0, 1))[0] / len(depths)
    assert 0.15 < quarters.min() and quarters.max() < 0.36, quarters


def without_divider(context: str) -> str:
    return re.sub(r"(\* ?)+\n$", "", context)


@pytest.mark.parametrize("family", ["niah_single", "niah_multikey", "niah_multivalue"])
def test_codes_stand_once_where_the_depths_say(family):
    for example in some(family, "validation", 1024, 40):
        text = without_divider(example.context)
        for turn in example.turns:
            for code, depth in zip(turn.answer.split(", "), turn.depths, strict=True):
                assert len(re.findall(rf"\b{code}\b", example.context)) == 1
                assert code in text[round(depth * len(text)) :].partition("\n")[0]


def test_there_are_distractors():
    for example in some("niah_multikey", "train", 1024, 40):
        keys = {tuple(key.split()) for key in re.findall(r"code of (\w+ \w+) is", example.context)}
        asked = {key for key in keys if any(" ".join(key) in turn.question for turn in example.turns)}
        assert all(any(sum(a == b for a, b in zip(key, other)) == 1 for other in keys - asked) for key in asked)
    for family, line in {"niah_multivalue": r"^The code of", "vt": r"^Let \w+ be \d"}.items():
        for example in some(family, "train", 1024, 40):
            assert len(re.findall(line, example.context, re.M)) >= len(example.turns) * (family == "vt") + 5
    for example in some("qa_two_hop", "train", 1024, 40):
        for turn in example.turns:
            (asked,) = re.findall(r"of ([A-Z]\w+ [A-Z]\w+)", turn.question)
            (own,) = re.findall(rf"^{asked} lives in (\w+)", example.context, re.M)
            assert own != turn.answer
    talk = [example.context for example in some("dialogue", "train", 1024, 40)]
    assert all("I do not have" in text for text in talk) and sum("No, I bring" in text for text in talk) > 20
    for example in some("dialogue", "train", 1024, 40):
        events = set(re.findall(r"I bring the \w+ to the (\w+)", example.context))
        assert any(not any(event in turn.question for turn in example.turns) for event in events)
    assert all(len(re.findall(r" (?:is|was) \w+\.$", e.context, re.M)) > 60 for e in some("niah_single", "train", 1024, 40))


def test_a_mixture_takes_long_contexts_by_name_and_length():
    mixture = Mixture({"niah_single@256": 1.0, "which_picture@300": 1.0, "word": 1.0})
    samples = samples_of(mixture, tokenizer(), PROCESSOR)
    lengths = sorted(len(samples[i].tokens) for i in range(12))
    assert lengths[3] < 60 and all(0.95 * 256 <= n <= 300 for n in lengths[4:])
    with pytest.raises(UserError, match="'niah_single@256', whose length needs the model's tokenizer"):
        examples(mixture)
    with pytest.raises(UserError, match="data.resize is 'wide', which changes the length of which_picture"):
        dataclasses.replace(mixture, resize="wide")


@pytest.mark.parametrize("name", ["pages@1024", "which_picture@1024"])
def test_pictures_are_not_shrunk_to_fit(name):
    found = samples_of(Mixture({name: 1.0}), tokenizer(), ImageProcessor(patch_size=14, max_size=140))[0]
    assert isinstance(found, Bad) and f"{name}: " in found.reason and "expected a larger max_size" in found.reason


@pytest.mark.parametrize(
    ("name", "message"),
    [("niah_single@", "expected FAMILY@TOKENS"), ("niah@256", "one of niah_single"), ("vt@-3", "vt@-3"), ("vt@1e9", "vt@1e9"),
     ("vt@999999", "vt@999999"), ("vt", "data.weights names 'vt'")],
)  # fmt: skip
def test_names_that_are_none_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        Mixture({name: 1.0})


def test_unknown_families_splits_and_lengths_are_refused():
    count = prompt_tokens(tokenizer(), PROCESSOR)
    assert long_name("niah_single@256") == ("niah_single", 256) and long_name("word") is None
    for arguments, message in [
        (("nothing", 0, 0, "train", 256), "family: found 'nothing', expected one of niah_single"),
        (("vt", 0, 0, "test", 256), "split: found 'test'"),
        (("vt", 0, 0, "train", 0), "tokens: found 0, expected 1 to 131,072"),
        (("vt", 0, 0, "train", 40), "vt@40: 40 tokens are too few for 2 questions"),
    ]:
        with pytest.raises(UserError, match=message):
            render_long(*arguments, count)
