"""One optimizer step of the whole network beside the same network in PyTorch on CPU: packed rows, pictures, float32.

Run: `python benchmarks/train_step.py --config pico` (or `33m`; `nano`: rows of 2,016 tokens), or `make bench` for everything.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent))  # beside this file, however it is run
import timing

from andesvl_jax.checkpoints.hf import params_to_hf
from andesvl_jax.config import CONFIGS, AndesVLConfig, TextConfig, VisionConfig
from andesvl_jax.inputs.image import ImageProcessor, Patches, patchify
from andesvl_jax.inputs.packing import Batch, Budget, Sample, assemble, make_sample
from andesvl_jax.training.config import Optimizer, TrainConfig
from andesvl_jax.training.step import init_state, train_step

GRIDS = ((8, 8), (8, 10))  # patches (rows, columns) of two pictures, each with its own conversation
SIZES = CONFIGS | {
    "33m": AndesVLConfig(
        vision=VisionConfig(hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4, table_side=8),
        text=TextConfig(
            vocab_size=8192, hidden_size=512, intermediate_size=1536, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64,
            rope_theta=1e4, max_position_embeddings=2048,
        ),
    )
}  # fmt: skip
PAIRS = {"33m": 2, "nano": 9}  # of conversations in a row, one where nothing is said; about as many tokens a step
TEXT = 80  # tokens of text of a conversation
SUPERVISED = 30  # of them, the last ones
OPTIMIZER = Optimizer(warmup_steps=2)
SCHEDULE_STEPS = 100
AGREEING_STEPS = 5  # before timing; the rate of the first one is 0, so losses part from the third on
IMAGE_TOKEN = 1


def run(config_name: str = "pico", quick: bool = False) -> dict[str, Any]:
    """Times training steps of both sides in turns and returns {"name", "rows"}.

    Raises:
      UserError: PyTorch is not installed, or the configuration is unknown or has an encoder the PyTorch side lacks.
    """
    import peer  # needs PyTorch

    config = timing.config_by_name(config_name, SIZES).replace(image_token_id=IMAGE_TOKEN)
    rows, runs = (2, 2) if quick else (16, 7)
    pairs = PAIRS.get(config_name, 1)
    batch = packed_batch(config, max(1, rows // pairs), pairs)
    state = init_state(TrainConfig(model=config, optimizer=OPTIMIZER, steps=SCHEDULE_STEPS))
    network = peer.Network(config, params_to_hf(state.params, config))
    torch_batch = peer.TorchBatch(config, batch)
    threads = timing.fastest_threads(peer.torch.set_num_threads, lambda: network(torch_batch).backward())
    o = OPTIMIZER
    rate = optax.warmup_cosine_decay_schedule(0.0, o.decoder, o.warmup_steps, SCHEDULE_STEPS, o.decoder * o.final_fraction)
    losses: list[float] = []

    def ours() -> None:
        nonlocal state
        state, metrics = train_step(state, batch, config, OPTIMIZER, SCHEDULE_STEPS)
        losses.append(float(jax.block_until_ready(metrics)["loss"]))
        jax.block_until_ready(state)

    def side(compiled: bool) -> tuple[Callable[[], None], list[float]]:
        found: list[float] = []
        copied = copy.deepcopy(network)
        trainer = peer.Trainer(copied, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm, compiled)
        return lambda: found.append(trainer.step(torch_batch, float(rate(len(found))))), found

    theirs = {"eager": side(False)} | ({} if quick else {"compiled": side(True)})
    steps = (ours, *(step for step, _ in theirs.values()))
    for step in steps:
        for _ in range(AGREEING_STEPS):
            step()  # the first call compiles
    share = timing.share_of_cores()
    a, *others = timing.in_turns(*((lambda step=step: timing.seconds(step)) for step in steps), runs=runs)
    eager = theirs["eager"][1]
    compared = [(step, losses[step - 1], eager[step - 1]) for step in (1, AGREEING_STEPS)]
    tokens = int(np.count_nonzero(batch.segments >= 0))
    patches = int(np.count_nonzero(batch.images.segments >= 0))
    return {
        "name": f"train_step {config_name}",
        "rows": [
            timing.quiet_row(share),
            timing.row("threads", timing.cores(), "threads", threads),
            *(timing.row(f"loss of step {step}", x, "nats", y) for step, x, y in compared),
            *(timing.row(f"difference of the losses, step {step}", abs(x - y), "nats") for step, x, y in compared),
            timing.row("tokens of a step", tokens, "tokens"),
            timing.row("patches of a step", patches, "patches"),
            *(
                timing.row(f"forward, backward, AdamW, PyTorch {name}", 1000 * a, "ms", 1000 * b, b / a)
                for name, b in zip(theirs, others, strict=True)
            ),
            timing.row("training speed", tokens / a, "tokens/s", tokens / min(others), min(others) / a),
        ],
    }


def packed_batch(config: AndesVLConfig, rows: int, pairs: int = 1) -> Batch:
    """Rows of `pairs` times two conversations, each about a picture of noise; with one, the shape of pico's training batches."""
    rng = np.random.default_rng(0)
    packed = [[_conversation(config, rng, grid) for grid in GRIDS * pairs] for _ in range(rows)]
    budget = Budget(rows, tokens=224 * pairs, patches=160 * pairs, targets=96 * pairs)
    return assemble(packed, budget, config.vision.patch_features)


def _conversation(config: AndesVLConfig, rng: np.random.Generator, grid: tuple[int, int]) -> Sample:
    side = config.vision.patch_size
    canvas = rng.integers(0, 256, (grid[0] * side, grid[1] * side, 3), np.uint8)
    picture = Patches(canvas, *patchify(canvas, ImageProcessor(patch_size=side)))
    tokens = np.concatenate([np.full(picture.visual_tokens, IMAGE_TOKEN), rng.integers(2, config.text.vocab_size, TEXT)])
    supervised = np.arange(len(tokens)) >= len(tokens) - SUPERVISED
    return make_sample(tokens, supervised, [picture], IMAGE_TOKEN)


if __name__ == "__main__":
    sys.exit(timing.main(run, "pico", __doc__.splitlines()[0]))
