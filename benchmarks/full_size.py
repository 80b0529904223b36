"""A model of full size without its weights: writes a random checkpoint in bfloat16, loads it in a fresh process, answers.

Run: `python benchmarks/full_size.py --config andesvl-1b --json`. The checkpoint goes to the directory for temporary files
(TMPDIR) and is removed again: 1.4, 1.9, 4.1 and 8.7 GB for the four sizes. Times include no compilation unless they say so.

Memory is that of the weights once, laid out for decoding.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # beside this file, however it is run
import timing

from andesvl_jax.checkpoints.json_file import write_json
from andesvl_jax.checkpoints.names import TIED_HEAD, hf_shapes
from andesvl_jax.checkpoints.safetensors_file import write_tensors
from andesvl_jax.config import AndesVLConfig, to_hf
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor

IMAGE_TOKEN = 151654  # <|vision_pad|> of the releases
SHARD_BYTES = 2_000_000_000
MEASURE = "import sys, json, full_size; print(json.dumps(full_size.measure(*json.loads(sys.argv[1]))))"


def run(config_name: str = "andesvl-0.6b", quick: bool = False, dtype: str = "bfloat16") -> dict[str, Any]:
    """Writes, loads and questions a random model of that size and returns {"name", "rows"}.

    Args:
      dtype: what the weights are loaded and computed in.
    Raises:
      UserError: an unknown configuration, too little room on the disk, or the loading process failed (out of memory).
    """
    config = timing.config_by_name(config_name).replace(param_dtype="bfloat16")
    side, steps = (112, 2) if quick else (448, 8)
    share = timing.share_of_cores()
    with tempfile.TemporaryDirectory(prefix="andesvl-full-size-") as directory:
        size = 2 * sum(map(math.prod, stored_shapes(config).values()))
        free = shutil.disk_usage(directory).free
        if free < 1.05 * size:
            raise UserError(
                f"{directory}: {free / 1e9:.1f} GB free, expected {1.05 * size / 1e9:.1f}; set TMPDIR to a larger disk."
            )
        writing = timing.seconds(lambda: write_random(Path(directory), config))
        written = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        found = _in_a_fresh_process(directory, dtype, side, steps)
    row = timing.row
    gib = 2.0**30
    return {
        "name": f"full_size {config_name} {dtype}",
        "rows": [
            timing.quiet_row(share),
            row("checkpoint on disk, bfloat16", written / 1e9, "GB"),
            row("writing it, random numbers included", writing, "s"),
            row("loading it, files in the page cache", found["load_s"], "s"),
            row("parameters in memory", found["params_bytes"] / gib, "GiB"),
            row("peak memory before loading", found["peak_before"] / gib, "GiB"),
            row("peak memory of loading", found["peak_load"] / gib, "GiB"),
            row("peak memory of encoding and prefill", found["peak_prefill"] / gib, "GiB"),
            row("visual tokens of the picture", found["visual_tokens"], "tokens"),
            row("first encoding and prefill, compilation included", found["cold_s"], "s"),
            row("encoding the picture", found["patches"] / found["encode_s"], "patches/s"),
            row(f"prefill of {found['prompt_tokens']} tokens", found["prompt_tokens"] / found["prefill_s"], "tokens/s"),
            row("decode", steps / found["decode_s"], "tokens/s"),
            row("peak memory of decoding", found["peak"] / gib, "GiB"),
        ],
    }


def stored_shapes(config: AndesVLConfig) -> dict[str, tuple[int, ...]]:
    """HF name -> shape; a tied head is not stored."""
    return {name: s for name, s in hf_shapes(config).items() if name != TIED_HEAD or not config.text.tie_word_embeddings}


def write_random(directory: Path, config: AndesVLConfig) -> None:
    """A checkpoint of random weights in `config.param_dtype`, one tensor in memory at a time; no tokenizer."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16) if config.param_dtype == "bfloat16" else np.dtype(np.float32)
    specs = {name: (dtype, shape) for name, shape in stored_shapes(config).items()}

    drawn = 0.02 * rng.standard_normal(9_999_991, np.float32)  # a prime, so that no two rows of a matrix are alike
    pools = {mean: (mean + drawn).astype(dtype) for mean in (0.0, 1.0)}

    def tensors() -> Iterator[np.ndarray]:
        for name, (_, shape) in specs.items():
            mean = 1.0 if len(shape) == 1 and not name.endswith("bias") else 0.0  # norms beside matrices, tables and biases
            pool, size, start = pools[mean], math.prod(shape), int(rng.integers(len(drawn)))
            times = -(-(start + size) // len(pool))
            yield (pool if times == 1 else np.tile(pool, times))[start : start + size].reshape(shape)

    write_tensors(directory, specs, tensors(), SHARD_BYTES)
    write_json(directory / "config.json", to_hf(config))
    mean_std = {} if config.vision.family == "aimv2" else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    processor = ImageProcessor(patch_size=config.vision.patch_size, **mean_std)
    write_json(directory / "preprocessor_config.json", processor.to_hf())


def _in_a_fresh_process(directory: str, dtype: str, side: int, steps: int) -> dict[str, Any]:
    """What `measure` returns in a process of its own, so that its peak of memory is the model's."""
    here = str(Path(__file__).resolve().parent)
    script, arguments = f"import sys; sys.path.insert(0, {here!r}); {MEASURE}", json.dumps((directory, dtype, side, steps))
    done = subprocess.run([sys.executable, "-c", script, arguments], capture_output=True, text=True)
    if done.returncode:
        reason = "killed, out of memory?" if done.returncode < 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the process that loads the model ended with {done.returncode} ({reason}).")
    return json.loads(done.stdout.splitlines()[-1])


def measure(directory: str, dtype: str, side: int, steps: int) -> dict[str, Any]:
    """Loads a checkpoint, asks 64 random tokens about a random picture of side x side pixels, decodes 2 x `steps` tokens."""
    import jax

    import andesvl_jax as avl
    from andesvl_jax.decoding.api import prompt_sample
    from andesvl_jax.decoding.sampling import sampling_options
    from andesvl_jax.decoding.session import Session
    from andesvl_jax.decoding.state import prefill, visual_tokens
    from andesvl_jax.inputs.image import prepare_image
    from andesvl_jax.inputs.packing import assemble_prompts

    peak_before = peak_bytes()
    began = time.perf_counter()
    image_token = min(IMAGE_TOKEN, json.loads((Path(directory) / "config.json").read_text())["text_config"]["vocab_size"] - 1)
    bundle = avl.load(directory, dtype=dtype, image_token_id=image_token, decode_only=True)
    jax.block_until_ready(bundle.params)
    load_s, peak_load = time.perf_counter() - began, peak_bytes()
    params_bytes = sum(x.nbytes for x in jax.tree.leaves(bundle.params))

    rng = np.random.default_rng(0)
    picture = prepare_image(rng.integers(0, 256, (side, side, 3), np.uint8), bundle.image_processor)
    text = rng.integers(0, image_token, 64).tolist()
    sample = prompt_sample(bundle, [*text[:8], *[image_token] * picture.visual_tokens, *text[8:]], [picture])
    batch = assemble_prompts([sample], bundle.config.vision.patch_features)
    params, config = bundle.decoding_params, bundle.decoding_config

    def encode():
        return jax.block_until_ready(visual_tokens(params, config, batch.images))

    def read(visual):
        return jax.block_until_ready(prefill(params, config, batch.tokens, batch.positions, visual, batch.visual_index))

    cold_s = timing.seconds(lambda: read(encode()))
    visual = encode()
    encode_s, prefill_s = timing.seconds(encode), timing.seconds(lambda: read(visual))
    peak_prefill = peak_bytes()
    session = Session(bundle)
    session.extend([sample])
    chunks = session.generate(sampling_options(1), 2 * steps, chunk=steps)
    next(chunks)
    decode_s = timing.seconds(lambda: next(chunks))
    return {
        "load_s": load_s, "peak_before": peak_before, "peak_load": peak_load, "peak_prefill": peak_prefill,
        "peak": peak_bytes(), "cold_s": cold_s, "params_bytes": params_bytes, "visual_tokens": picture.visual_tokens,
        "patches": sample.patches, "prompt_tokens": len(sample.tokens), "encode_s": encode_s, "prefill_s": prefill_s,
        "decode_s": decode_s,
    }  # fmt: skip


def peak_bytes() -> int:
    """The most memory this process has had so far. (Of getrusage a child inherits the parent's peak on Linux.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    sys.exit(timing.main(run, "andesvl-0.6b", __doc__.splitlines()[0]))
