"""How full packed rows are: the demo's mixtures, and a synthetic heavy-tailed mixture of pictures and text. Nothing is timed.

Command:

    .venv/bin/python benchmarks/packing.py
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # beside this file, however it is run
from pipeline import mixtures

from andesvl_jax.data.best_fit import next_row
from andesvl_jax.data.corpus import corpus, train_tokenizer
from andesvl_jax.data.pipeline import LOOK_AHEAD, samples_of
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.packing import sizes
from andesvl_jax.inputs.tokenizer import Tokenizer
from andesvl_jax.training.config import TrainConfig

Sizes = tuple[int, ...]
LONGEST = 4096  # tokens of a conversation of the heavy-tailed mixture


def mixed_stream(config: TrainConfig, tokenizer: Tokenizer) -> Iterator[Sizes]:
    processor = ImageProcessor.from_hf({"min_tokens": config.min_tokens}, config.model.vision, max_size=config.max_size)
    samples = samples_of(config.data, tokenizer, processor)
    return (sizes([samples[i]]) for i in itertools.count())


def heavy_stream(seed: int = 0) -> Iterator[Sizes]:
    """Conversations of log-normal text with 0 to 4 pictures of log-normal area (at most 729 visual tokens); half is answers."""
    rng = np.random.default_rng(seed)
    while True:
        text = int(np.exp(rng.normal(5.3, 1.3))) + 16
        areas = np.exp(rng.normal(5.3, 0.9, rng.choice([0, 1, 2, 4], p=[0.25, 0.6, 0.1, 0.05])))
        visual = int(np.clip(areas, 4, 729).astype(int).sum())
        text = min(text, LONGEST - visual)
        if text > 0 and visual <= LONGEST // 2:  # more is no training data for the smallest row: it has 2 patches per token
            yield text + visual, 4 * visual, text // 2


def mean_fill(stream: Iterator[Sizes], budgets: Sizes, rows: int, look_ahead: int) -> np.ndarray:
    """Mean share of each budget that is used in the first `rows` rows."""
    waiting, drawn = {}, {}

    def draws():
        for number, item in enumerate(stream):
            drawn[number] = item
            yield number, item

    items = draws()
    return np.mean(
        [np.sum([drawn[n] for n in next_row(waiting, items, budgets, look_ahead)], 0) / budgets for _ in range(rows)], axis=0
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=400, help="rows that the shares are means of")
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(corpus(0), Path(folder) / "tokenizer.json")
        tokenizer = Tokenizer.load(folder)
    cases = [
        (name, lambda config=config: mixed_stream(config, tokenizer), config.budget.sizes) for name, config in mixtures().items()
    ] + [
        (f"heavy-tailed, rows of {tokens:,}", heavy_stream, (tokens, 2 * tokens, tokens // 2)) for tokens in (4096, 8192, 16384)
    ]  # fmt: skip
    print("| mixture | look-ahead | tokens | patches | targets | efficiency: the tightest of them |\n|" + " --- |" * 6)
    for name, stream, budgets in cases:
        for look_ahead in (1, 8, LOOK_AHEAD):
            shares = mean_fill(stream(), budgets, rows, look_ahead)
            print(
                f"| {name} | {look_ahead} | " + " | ".join(f"{100 * s:.1f} %" for s in (*shares, shares.max())) + " |", flush=True
            )


if __name__ == "__main__":
    main()
