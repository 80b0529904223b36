"""Text decoding beside `transformers` Qwen3 on CPU: one row, 512 tokens of context, the same random weights, 32 and 16 bits.

Run: `python benchmarks/decode.py --config andesvl-0.6b`, or `make bench` for everything.
T prompt tokens, V vocabulary.
"""

import functools
import sys
import time
from pathlib import Path
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # beside this file, however it is run
import timing

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.names import entries
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.decoding.sampling import sampling_options
from andesvl_jax.decoding.session import Session
from andesvl_jax.decoding.state import prefill
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.packing import make_sample
from andesvl_jax.kernels import cpu
from andesvl_jax.model.andesvl import AndesVL, describe
from andesvl_jax.weights import Streamed, is_param, path_name

DTYPES = ("float32", "bfloat16")  # of the weights; this project computes in float32 with both, PyTorch in that of the weights


def run(config_name: str = "andesvl-0.6b", quick: bool = False) -> dict[str, Any]:
    """Times prefill and decoding of all sides in turns and returns {"name", "rows"}.

    Raises:
      UserError: PyTorch is not installed, or the configuration is unknown or none the PyTorch side has.
    """
    import peer  # needs PyTorch

    config = timing.config_by_name(config_name).replace(layer_loop="unroll")
    context, steps, runs = (64, 4, 2) if quick else (512, 16, 5)
    tokens = np.random.default_rng(0).integers(0, config.text.vocab_size, (1, context), np.int32)
    share = timing.share_of_cores()
    weights = {dtype: _weights(peer, config, dtype, compiled=cpu.available()) for dtype in DTYPES}
    rows = [row for dtype in DTYPES for row in _prefill_rows(peer, *weights[dtype], config, dtype, tokens, runs)]
    rows += _decode_rows(peer, weights, config, tokens, steps, runs, compiled=not quick)
    return {"name": f"decode {config_name}", "rows": [timing.quiet_row(share), *rows]}


def _weights(peer, config: AndesVLConfig, dtype: str, compiled: bool) -> tuple[Any, AndesVL]:
    """A PyTorch model and this project's parameters for decoding, over the same memory: neither side copies a matrix."""
    decoder = [entry for entry in entries(config) if entry.path.startswith("decoder.")]
    shapes = {name: shape for entry in decoder for name, shape in entry.shapes().items()}
    tensors = peer.random_tensors(shapes, getattr(peer.torch, dtype))

    def leaf(name: str) -> jax.Array | Streamed:
        shared = jnp.from_dlpack(tensors[name])
        return Streamed(shared, "embed" in name or "lm_head" in name, compiled) if shared.ndim == 2 else shared

    description = describe(config).decoder
    names = {entry.path.removeprefix("decoder."): entry.names[0] for entry in decoder}
    flat, tree = jax.tree_util.tree_flatten_with_path(description, is_leaf=is_param)
    of_layer = lambda i: tree.unflatten([leaf(names[path_name(path)].format(i=i)) for path, _ in flat])  # noqa: E731
    layers = tuple(of_layer(i).layers for i in range(config.text.num_layers))
    params = AndesVL(vision=None, projector=None, decoder=of_layer(0).replace(layers=layers))
    return peer.build_decoder(config.text, tensors), params


def _prefill_rows(peer, model, params: AndesVL, config: AndesVLConfig, dtype: str, tokens, runs: int) -> list[timing.Row]:
    """Rows about reading tokens int32 [1, T]."""
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    text_only = np.full_like(tokens, -1)

    def ours() -> np.ndarray:
        state = jax.block_until_ready(prefill(params, config, tokens, positions, None, text_only))
        return np.asarray(state.last)

    theirs = functools.partial(peer.prefill, model, tokens)
    threads = timing.fastest_threads(peer.torch.set_num_threads, theirs)
    expected, found = theirs()[0].float().numpy(), ours()  # also compiles
    a, b = timing.in_turns(lambda: timing.seconds(ours), lambda: timing.seconds(theirs), runs=runs)
    return [
        timing.row(f"largest logit difference, {dtype}", float(np.abs(found - expected).max()), "logits"),
        timing.row(f"largest logit, {dtype}", float(np.abs(expected).max()), "logits"),
        timing.row(f"threads, prefill, {dtype}", timing.cores(), "threads", threads),
        timing.row(f"prefill of {tokens.size} tokens, {dtype}", tokens.size / a, "tokens/s", tokens.size / b, b / a),
    ]


def _decode_rows(peer, weights, config: AndesVLConfig, tokens, steps: int, runs: int, compiled: bool) -> list[timing.Row]:
    """Rows about greedy decoding behind tokens [1, T]: `steps` tokens to warm up, then `steps` timed ones."""
    answers: dict[tuple[str, str], list[int]] = {}
    sides: dict[tuple[str, str], Callable[[], float]] = {}
    for dtype, (model, params) in weights.items():
        sides["ours", dtype] = _our_side(params, config, tokens, steps, answers, ("ours", dtype))
        sides["eager", dtype] = _their_side(peer, model, model, None, tokens, steps, answers, ("eager", dtype))
        if compiled:
            step = peer.torch.compile(model.forward)
            slots = tokens.size + 2 * steps
            sides["compiled", dtype] = _their_side(peer, model, step, slots, tokens, steps, answers, ("compiled", dtype))
    for side in sides.values():
        side()  # compiles
    threads = timing.fastest_threads(peer.torch.set_num_threads, sides["eager", DTYPES[0]], runs=1)
    bandwidth = timing.read_bandwidth()
    seconds = dict(zip(sides, timing.in_turns(*sides.values(), runs=runs), strict=True))
    bandwidth = max(bandwidth, timing.read_bandwidth())  # before and after, so that a moment of other work does not lower it
    rows = [
        timing.row("threads, decode", timing.cores(), "threads", threads),
        timing.row("read bandwidth of this machine", bandwidth / 1e9, "GB/s"),
    ]
    for dtype, (_, params) in weights.items():
        mine = seconds["ours", dtype]
        equal = sum(x == y for x, y in zip(answers["ours", dtype], answers["eager", dtype], strict=True))
        read = _bytes_per_token(params, config, tokens.size + steps + steps // 2)
        least = read * steps / bandwidth  # seconds that reading alone would take
        rows.append(timing.row(f"equal tokens of {2 * steps} decoded greedily, {dtype}", equal, "tokens"))
        for name in ("eager", "compiled")[: 1 + compiled]:
            theirs = seconds[name, dtype]
            what = f"decode behind {tokens.size}, {dtype}, PyTorch {name}"
            rows.append(timing.row(what, steps / mine, "tokens/s", steps / theirs, theirs / mine))
        rows.append(timing.row(f"bytes read per token, {dtype}", read / 1e9, "GB"))
        share = least / seconds["eager", dtype]
        rows.append(timing.row(f"share of the read bandwidth, {dtype}", least / mine, "of 1", share))
    ratio = seconds["ours", "float32"] / seconds["ours", "bfloat16"]
    return [*rows, timing.row("16-bit weights over this project's 32-bit ones", ratio, "times")]


def _our_side(params: AndesVL, config: AndesVLConfig, tokens, steps: int, answers: dict, key) -> Callable[[], float]:
    sample = make_sample(tokens[0], np.zeros(tokens.size, bool), (), -1)
    bundle = Bundle(config, params, None, ImageProcessor(patch_size=config.vision.patch_size))

    def side() -> float:
        session = Session(bundle)
        session.extend([sample])
        chunks = session.generate(sampling_options(1), 2 * steps, chunk=steps)
        next(chunks)
        began = time.perf_counter()
        ids = next(chunks)
        spent = time.perf_counter() - began
        answers[key] = ids[0].tolist()
        return spent

    return side


def _their_side(peer, model, step, slots: int | None, tokens, steps: int, answers: dict, key) -> Callable[[], float]:
    prompt_last, growing = peer.prefill(model, tokens)

    def side() -> float:
        if slots is None:  # a cache that grows can be cut back to the prompt; one of fixed size is filled anew
            last, cache = prompt_last, growing
            if made := cache.get_seq_length() - tokens.size:
                cache.crop(-made)
        else:
            last, cache = peer.prefill(model, tokens, slots)
        first, last = peer.decode(step, last, cache, steps)
        began = time.perf_counter()
        second, _ = peer.decode(step, last, cache, steps)
        spent = time.perf_counter() - began
        answers[key] = first + second
        return spent

    return side


def _bytes_per_token(params: AndesVL, config: AndesVLConfig, context: int) -> float:
    """Bytes that decoding one token must read: every weight of the decoder once, and keys and values of `context` tokens."""
    text = config.text
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params.decoder))
    if not text.tie_word_embeddings:  # of an embedding that is not the head one row is read
        weights -= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params.decoder.embedding))
    cached = 2 * text.num_layers * text.num_kv_heads * text.head_dim * context
    return weights + cached * jnp.dtype(config.dtype).itemsize


if __name__ == "__main__":
    sys.exit(timing.main(run, "andesvl-0.6b", __doc__.splitlines()[0]))
