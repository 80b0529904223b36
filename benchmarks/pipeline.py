"""How fast training input is made beside how fast the step on CPU uses it up: the demo's pictures drawn, patched and packed.

Command:

    .venv/bin/python benchmarks/pipeline.py
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # beside this file, however it is run
import timing

from andesvl_jax.data.corpus import corpus, train_tokenizer
from andesvl_jax.data.mixture import Mixture
from andesvl_jax.data.pipeline import batches
from andesvl_jax.demo import STAGES
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.packing import Batch, Budget
from andesvl_jax.inputs.tokenizer import Tokenizer
from andesvl_jax.training.config import TrainConfig
from andesvl_jax.training.step import init_state, train_step

ROWS = Budget(rows=3, tokens=512, patches=448, targets=224)
BATCHES, STEPS = 30, 8  # timed of each
PREPARED = 4  # batches that may be ready before the clock runs


def mixtures() -> dict[str, TrainConfig]:
    """The demo's stages, and all rendered families in rows as nano has them."""
    stages = {f"demo: {name}": config for name, config in STAGES.items()}
    return stages | {"every family": replace(STAGES["reading"], data=Mixture(), budget=ROWS)}


def speeds(config: TrainConfig, tokenizer: Tokenizer) -> tuple[float, float]:
    """Tokens per second that the pipeline makes and that the step uses up, each with the machine to itself."""
    model = config.model.replace(image_token_id=tokenizer.image_token_id)
    processor = ImageProcessor.from_hf({"min_tokens": config.min_tokens}, model.vision, max_size=config.max_size)
    source = iter(batches(config.data, tokenizer, processor, config.budget, model.vision.patch_features))
    for _ in range(PREPARED):
        batch: Batch = next(source)
    drawn: list[Batch] = []
    made = timing.seconds(lambda: drawn.extend(next(source) for _ in range(BATCHES)))
    state = init_state(config)
    times = []
    for _ in range(STEPS + 1):

        def step() -> None:
            nonlocal state
            state, metrics = train_step(state, batch, model, config.optimizer, config.steps)
            jax.block_until_ready((state, metrics))

        times.append(timing.seconds(step))
    tokens = [int(np.count_nonzero(b.segments >= 0)) for b in (*drawn, batch)]
    return sum(tokens[:-1]) / made, tokens[-1] / statistics.median(times[1:])  # the first step compiles


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(corpus(0), Path(folder) / "tokenizer.json")
        tokenizer = Tokenizer.load(folder)
    print(f"{'mixture':<24s} {'made':>16s} {'used up':>16s} {'ratio':>6s}")
    for name, config in mixtures().items():
        made, used = speeds(config, tokenizer)
        print(f"{name:<24s} {made:>9,.0f} tokens/s {used:>7,.0f} tokens/s {made / used:>6.1f}")


if __name__ == "__main__":
    main()
