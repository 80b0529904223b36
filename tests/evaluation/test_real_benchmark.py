"""Questions about prepared real pictures: all that a source has, of every task at most as many as asked for, by its rows."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from andesvl_jax.errors import UserError
from andesvl_jax.evaluation.benchmarks import real_validation


def write(folder, source, records):
    """records: (tasks, [(question, answer), ...]), one picture each of a grey level of its own."""
    (folder / source).mkdir(parents=True)
    with tarfile.open(folder / source / "validation.tar", "w") as out:
        for number, (tasks, turns) in enumerate(records):
            picture = io.BytesIO()
            Image.new("RGB", (9, 7), (number, number, number)).save(picture, "PNG")
            messages = []
            for question, answer in turns:
                content = [{"type": "image"}] * (not messages) + [{"type": "text", "text": question}]
                messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            record = {"messages": messages} | ({} if tasks is None else {"tasks": tasks})
            for name, data in ((f"{number:03d}.png", picture.getvalue()), (f"{number:03d}.json", json.dumps(record).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))


def test_every_question_is_asked_with_its_own_picture_and_answer(tmp_path):
    turns = lambda n: [(f"name of {n}?", f"name {n}"), (f"place of {n}?", f"place {n}"), (f"other name of {n}?", f"name {n}")]  # noqa: E731
    write(tmp_path, "flags", [(["name", "place", "name"], turns(n)) for n in range(30)])
    write(tmp_path, "maps", [(["name"], turns(n)[:1]) for n in range(4)])
    items = real_validation(tmp_path, 10)
    assert Counter(item.row for item in items) == {"flags/name": 10, "flags/place": 10, "maps/name": 4}
    for item in items:
        (image,) = item.images
        number = image[0, 0, 0]
        assert image.shape == (7, 9, 3) and np.all(image == number)
        assert item.question.endswith(f"of {number}?") and item.answer == f"{item.task} {number}"
    assert len({(item.row, item.images[0][0, 0, 0]) for item in items}) == 24, "one question a task and picture"
    again = real_validation(tmp_path, 10)
    assert [(i.row, i.question) for i in again] == [(i.row, i.question) for i in items]


def test_what_is_no_output_of_prepare_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="none: found no SOURCE/validation.tar, expected the --out of andesvl prepare real"):
        real_validation(tmp_path / "none", 5)
    write(tmp_path, "mine", [(None, [("what?", "that")])])
    with pytest.raises(UserError, match="sample 1 names no tasks"):
        real_validation(tmp_path, 5)
