"""Text decoding beside `transformers` Qwen3 on CPU: one row, 512 tokens of context, the same random weights in float32.

Run: `python benchmarks/decode.py --config andesvl-0.6b`, or `make bench` for everything.
T prompt tokens, V vocabulary.
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # beside this file, however it is run
import timing

from andesvl_jax.checkpoints.hf import params_to_hf
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.decoding.generate import DecodingState, new_tokens_of, prefill
from andesvl_jax.decoding.generate import run as generate
from andesvl_jax.decoding.sampling import sampling_options
from andesvl_jax.inputs.packing import assemble_prompts, make_sample
from andesvl_jax.model.andesvl import AndesVL, describe, for_decoding
from andesvl_jax.weights import initialize


def run(config_name: str = "andesvl-0.6b", quick: bool = False) -> dict[str, Any]:
    """Times prefill and decoding of both sides in turns and returns {"name", "rows"}.

    Raises:
      UserError: PyTorch is not installed, or the configuration is unknown or none the PyTorch side has.
    """
    import peer  # needs PyTorch

    config = timing.config_by_name(config_name)
    context, steps, runs = (64, 4, 2) if quick else (512, 16, 5)
    params = initialize(describe(config), jax.random.key(0), config.param_dtype)
    model = peer.build_decoder(config.text, params_to_hf(params, config))
    params = for_decoding(params)
    tokens = np.random.default_rng(0).integers(0, config.text.vocab_size, (1, context), np.int32)

    share = timing.share_of_cores()
    rows = _prefill_rows(peer, model, params, config, tokens, runs)
    rows += _decode_rows(peer, model, params, config, tokens, steps, runs)
    return {"name": f"decode {config_name}", "rows": [timing.quiet_row(share), *rows]}


def _prefill_rows(peer, model, params: AndesVL, config: AndesVLConfig, tokens: np.ndarray, runs: int) -> list[timing.Row]:
    """Rows about reading tokens int32 [1, T]."""
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    text_only = np.full_like(tokens, -1)

    def ours() -> np.ndarray:
        last, cache = jax.block_until_ready(prefill(params, config, tokens, positions, None, text_only))
        return np.asarray(last)

    threads = timing.fastest_threads(peer.torch.set_num_threads, lambda: peer.prefill(model, tokens))
    expected, found = peer.prefill(model, tokens)[0].numpy(), ours()  # also compiles
    a, b = timing.in_turns(lambda: timing.seconds(ours), lambda: timing.seconds(lambda: peer.prefill(model, tokens)), runs)
    return [
        timing.row("largest logit difference after the prompt", float(np.abs(found - expected).max()), "logits"),
        timing.row("largest logit", float(np.abs(expected).max()), "logits"),
        timing.row("threads, prefill", timing.cores(), "threads", threads),
        timing.row(f"prefill of {tokens.size} tokens", tokens.size / a, "tokens/s", tokens.size / b, b / a),
    ]


def _decode_rows(
    peer, model, params: AndesVL, config: AndesVLConfig, tokens: np.ndarray, steps: int, runs: int
) -> list[timing.Row]:
    """Rows about greedy decoding behind tokens [1, T]: `steps` tokens to warm up, then `steps` timed ones."""
    sample = make_sample(tokens[0], np.zeros(tokens.size, bool), (), -1)
    batch = assemble_prompts([sample], config.vision.patch_features)
    answers: dict[str, list[int]] = {}
    prompt_last, cache = peer.prefill(model, tokens)

    def ours() -> float:
        states = generate(params, config, batch, sampling_options(1), 2 * steps, chunk=steps)
        jax.block_until_ready(next(states))
        began = time.perf_counter()
        state: DecodingState = jax.block_until_ready(next(states))
        spent = time.perf_counter() - began
        answers["ours"] = new_tokens_of(state)[0].tolist()
        return spent

    def theirs() -> float:
        made = cache.get_seq_length() - tokens.size
        if made:
            cache.crop(-made)
        first, last = peer.decode(model, prompt_last, cache, steps)
        began = time.perf_counter()
        second, _ = peer.decode(model, last, cache, steps)
        spent = time.perf_counter() - began
        answers["peer"] = first + second
        return spent

    ours()  # compiles
    threads = timing.fastest_threads(peer.torch.set_num_threads, lambda: peer.decode(model, prompt_last, cache, 2))
    bandwidth = timing.read_bandwidth()
    a, b = timing.in_turns(ours, theirs, runs)
    bandwidth = max(bandwidth, timing.read_bandwidth())  # before and after, so that a moment of other work does not lower it
    equal = sum(x == y for x, y in zip(answers["ours"], answers["peer"], strict=True))
    read = _bytes_per_token(params, config, tokens.size + steps + steps // 2)
    least = read * steps / bandwidth  # seconds that reading alone would take
    return [
        timing.row(f"equal tokens of {2 * steps} decoded greedily", equal, "tokens"),
        timing.row("threads, decode", timing.cores(), "threads", threads),
        timing.row(f"decode behind {tokens.size} tokens", steps / a, "tokens/s", steps / b, b / a),
        timing.row("read bandwidth of this machine", bandwidth / 1e9, "GB/s"),
        timing.row("bytes read per token (weights, keys, values)", read / 1e9, "GB"),
        timing.row("share of the read bandwidth while decoding", least / a, "of 1", least / b),
    ]


def _bytes_per_token(params: AndesVL, config: AndesVLConfig, context: int) -> float:
    """Bytes that decoding one token must read: every weight of the decoder once, and keys and values of `context` tokens."""
    text = config.text
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params.decoder))
    if not text.tie_word_embeddings:  # of an embedding that is not the head one row is read
        weights -= params.decoder.embedding.size * params.decoder.embedding.dtype.itemsize
    cached = 2 * text.num_layers * text.num_kv_heads * text.head_dim * context
    return weights + cached * jnp.dtype(config.dtype).itemsize


if __name__ == "__main__":
    sys.exit(timing.main(run, "andesvl-0.6b", __doc__.splitlines()[0]))
