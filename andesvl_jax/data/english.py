"""General English that comes with installed packages: Python's own help topics and scikit-learn's data set descriptions."""

import functools
import importlib.util
import pydoc_data.topics
import re
from collections.abc import Iterator
from pathlib import Path

WORD = re.compile(r"\b[a-z]{2,12}\b")


def general_text() -> Iterator[str]:
    """Both, in a fixed order."""
    for _, text in sorted(pydoc_data.topics.topics.items()):
        yield text
    # The folder is found without importing scikit-learn, which takes a second.
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    for path in sorted((package / "datasets" / "descr").glob("*.rst")):
        yield path.read_text(encoding="utf-8")


@functools.cache
def words() -> tuple[str, ...]:
    """Its words of 2 to 12 letters in lower case, each once, in alphabetical order; about 3,700."""
    return tuple(sorted({word for text in general_text() for word in WORD.findall(text.lower())}))
