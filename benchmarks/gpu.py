"""Training and decoding of a released size on one accelerator: MFU of a packed step, share of the memory bandwidth in decoding.

Run: `python benchmarks/gpu.py --config andesvl-1b --json`. Weights are random; a row of 4,096 tokens holds eight conversations with a
picture of 448 x 448 each. MFU counts what these need (`model/flops.py`), against the data sheet's peak where it is known and against
a large matrix product timed in the same run; the bandwidth is that of a large copy in the same run.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # beside this file, however it is run
import timing

from andesvl_jax.config import AndesVLConfig
from andesvl_jax.decoding.generate import run as generate
from andesvl_jax.decoding.sampling import sampling_options
from andesvl_jax.inputs.image import ImageProcessor, prepare_image
from andesvl_jax.inputs.packing import Batch, Budget, assemble, assemble_prompts, make_sample
from andesvl_jax.model.andesvl import AndesVL, describe
from andesvl_jax.model.flops import batch_flops
from andesvl_jax.training.config import PARTS, Optimizer, TrainConfig
from andesvl_jax.training.metrics import peak_memory
from andesvl_jax.training.peak import peak_flops
from andesvl_jax.training.train import init_state, train_step
from andesvl_jax.weights import initialize

ROWS, TOKENS = 8, 4096
CONVERSATIONS, SIDE, SUPERVISED = 8, 447, 128  # of a row; pixels of a picture, tokens of an answer
OPTIMIZER = Optimizer(vision=1e-5, projector=1e-5, decoder=1e-5, warmup_steps=1)
STEPS, RUNS = 6, 3  # timed training steps, and runs of everything else
CONTEXT, NEW = 512, 64
IMAGE_TOKEN = 1


def run(config_name: str = "andesvl-1b", quick: bool = False) -> dict[str, Any]:
    """Times a training step and decoding, and returns {"name", "rows"}. Raises UserError for an unknown configuration."""
    config = timing.config_by_name(config_name).replace(dtype="bfloat16", remat="layer")
    device = jax.devices()[0]
    side = 512 if quick else 8192
    product, copy = _best(_product(side), 2 * side**3), _best(_copy(side), 2 * 2 * side**2 * 8)
    rows = [
        timing.row("matrix product, bfloat16", product / 1e12, "TFLOP/s"),
        timing.row("copy, read and written", copy / 1e9, "GB/s"),
    ]
    rows += _decode_rows(config, copy, NEW // 16 if quick else NEW)
    rows += _train_rows(config, product, device, 1 if quick else ROWS)
    return {"name": f"gpu {config_name} on {device.device_kind}", "rows": rows}


def _best(fn: Callable[[], Any], work: int) -> float:
    """`work` a second, of the fastest of several calls; the first compiles."""
    fn()
    return work / min(timing.seconds(fn) for _ in range(10))


def _product(side: int) -> Callable[[], Any]:
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(a, b))


def _copy(side: int) -> Callable[[], Any]:
    x = jnp.ones((8, side, side), jnp.bfloat16)
    negative = jax.jit(jnp.negative)
    return lambda: jax.block_until_ready(negative(x))


def _train_rows(config: AndesVLConfig, product: float, device: jax.Device, rows: int) -> list[timing.Row]:
    training = TrainConfig(model=config, optimizer=OPTIMIZER, steps=1000)
    state, batch = init_state(training), packed_batch(config, rows)
    on_device = jax.device_put(batch)
    times = []
    for _ in range(STEPS + 2):
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(train_step(state, on_device, config, OPTIMIZER, 1000))
        times.append(time.perf_counter() - began)
    step = statistics.median(times[2:])  # the first compiles
    rate, peak = batch_flops(config, batch, PARTS) / step, peak_flops(device.device_kind)
    found = [
        timing.row("tokens of a step", int(np.count_nonzero(batch.segments >= 0)), "tokens"),
        timing.row("patches of a step", int(np.count_nonzero(batch.images.segments >= 0)), "patches"),
        timing.row("first training step, compilation included", times[0], "s"),
        timing.row("training step", 1000 * step, "ms"),
        timing.row("training speed", batch.tokens.size / step, "tokens/s"),
        timing.row("what the work needs", rate / 1e12, "TFLOP/s"),
        timing.row("share of the matrix product's rate", rate / product, "of 1"),
        timing.row("loss", float(metrics["loss"]), "nats"),
        *(timing.row(name, value / 2**30, "GiB") for name, value in peak_memory([device]).items()),
    ]
    return found if peak is None else [*found, timing.row("MFU, of the data sheet's peak", rate / peak, "of 1")]


def packed_batch(config: AndesVLConfig, rows: int) -> Batch:
    """Full rows of random tokens and pictures of noise."""
    rng = np.random.default_rng(0)
    processor = ImageProcessor(patch_size=config.vision.patch_size, max_size=SIDE + 1)
    length = TOKENS // CONVERSATIONS

    def conversation():
        picture = prepare_image(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8), processor)
        text = rng.integers(2, config.text.vocab_size, length - picture.visual_tokens)
        tokens = np.concatenate([np.full(picture.visual_tokens, IMAGE_TOKEN), text])
        return make_sample(tokens, np.arange(length) >= length - SUPERVISED, [picture], IMAGE_TOKEN)

    packed = [[conversation() for _ in range(CONVERSATIONS)] for _ in range(rows)]
    patches = sum(sample.patches for sample in packed[0])
    return assemble(packed, Budget(rows, TOKENS, patches, CONVERSATIONS * SUPERVISED), config.vision.patch_features)


def _decode_rows(config: AndesVLConfig, bandwidth: float, new: int) -> list[timing.Row]:
    """One row of greedy decoding behind CONTEXT tokens, weights in bfloat16: `new` tokens to warm up, then as many timed."""
    config = config.replace(param_dtype="bfloat16", remat="none")
    decoder = jax.jit(partial(initialize, describe(config).decoder, dtype="bfloat16"))(jax.random.key(0))
    params = AndesVL(None, None, decoder)
    tokens = np.random.default_rng(0).integers(2, config.text.vocab_size, CONTEXT)
    batch = assemble_prompts([make_sample(tokens, np.zeros(CONTEXT, bool), (), IMAGE_TOKEN)], config.vision.patch_features)

    def decoding() -> float:
        states = generate(params, config, batch, sampling_options(1), 2 * new, chunk=new)
        jax.block_until_ready(next(states))
        return timing.seconds(lambda: jax.block_until_ready(next(states)))

    decoding()  # compiles
    seconds = statistics.median(decoding() for _ in range(RUNS))
    text = config.text
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(decoder))
    cached = 2 * 2 * text.num_layers * text.num_kv_heads * text.head_dim * (CONTEXT + new + new // 2)
    return [
        timing.row(f"decode behind {CONTEXT}, one row", new / seconds, "tokens/s"),
        timing.row("bytes read per token", (weights + cached) / 1e9, "GB"),
        timing.row("share of the copy's bandwidth", (weights + cached) * new / seconds / bandwidth, "of 1"),
    ]


if __name__ == "__main__":
    sys.exit(timing.main(run, "andesvl-1b", __doc__.splitlines()[0]))
