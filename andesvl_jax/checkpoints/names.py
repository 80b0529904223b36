"""The one map between this project's parameter tree and the tensor names of the HF layout.

Sources: state-dict names of the released checkpoints (tests/golden/keys). HF matrices are [out, in], ours [in, out].
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from andesvl_jax.checkpoints.stored import transfer
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.model.andesvl import describe
from andesvl_jax.weights import Param, is_param, path_name

TIED_HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"


@dataclass(frozen=True)
class Entry:
    """One leaf of the tree and the HF tensors it is made of; several names are fused along the output axis."""

    path: str
    names: tuple[str, ...]  # with {i} where the leaf is stacked over layers
    kind: Literal["matrix", "conv", "plain", "table"]
    param: Param

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """HF name -> HF shape, for every layer."""
        layers = range(self.param.shape[0]) if self._layered else (0,)
        return {name.format(i=i): self._hf_shape() for i in layers for name in self.names}

    def _hf_shape(self) -> tuple[int, ...]:
        shape = self.param.shape[1:] if self._layered else self.param.shape
        if self.kind in ("matrix", "conv"):
            shape = shape[::-1]
        shape = (shape[0] // len(self.names), *shape[1:])
        if self.kind == "conv":
            side = int((shape[1] // 3) ** 0.5)
            shape = (shape[0], 3, side, side)
        if self.kind == "table":
            shape = (1, *shape)
        return shape

    @property
    def _layered(self) -> bool:
        return "{i}" in self.names[0]

    def fill(self, out: np.ndarray, bounds: Sequence[tuple[int, int]], read: Callable[[str], np.ndarray]) -> None:
        """Writes leaf[start:stop, ...] into `out`, cast to its type, for the (start, stop) of each axis.

        read(name) gives an HF tensor; it may be a view of a file, and is let go before the next one is asked for.
        """
        if not self._layered:
            return self._fill_layer(out, bounds, read, 0)
        for row, i in enumerate(range(*bounds[0])):
            self._fill_layer(out[row], bounds[1:], read, i)

    def _fill_layer(self, out: np.ndarray, bounds: Sequence[tuple[int, int]], read, i: int) -> None:
        if self.kind in ("matrix", "conv"):  # as HF has it: [out, in]
            out, bounds = out.T, bounds[::-1]
        (start, stop), *inner = bounds
        shape, first = self._flat_shape(), 0
        for name in self.names:
            low, high = max(start, first), min(stop, first + shape[0])
            if low < high:
                x = read(name.format(i=i)).reshape(shape)[low - first : high - first]
                transfer(out[low - start : high - start], x[:, slice(*inner[0])] if inner else x)
            first += shape[0]

    def _flat_shape(self) -> tuple[int, ...]:
        """One HF tensor as a vector or a matrix, its axis of fusion first."""
        shape = self._hf_shape()
        if self.kind == "table":
            return shape[1:]
        return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else shape

    def to_hf(self, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The inverse of `fill`: names and tensors in the order of `shapes`, made one at a time."""
        for i, layer in enumerate(leaf if self._layered else leaf[None]):
            x, first = layer.T if self.kind in ("matrix", "conv") else layer, 0
            for name in self.names:
                part = np.empty(self._flat_shape(), leaf.dtype)
                if x is layer:
                    part[...] = x[first : first + len(part)]
                else:
                    transfer(part.T, layer[:, first : first + len(part)])
                first += len(part)
                yield name.format(i=i), part.reshape(self._hf_shape())


def entries(config: AndesVLConfig) -> list[Entry]:
    """All leaves of the configuration with their HF names."""
    names = _aimv2_names() if config.vision.family == "aimv2" else _siglip2_names()
    names |= _projector_names() | _decoder_names()
    flat, _ = jax.tree_util.tree_flatten_with_path(describe(config), is_leaf=is_param)
    return [Entry(path_name(path), *names[path_name(path)], param) for path, param in flat]


def hf_shapes(config: AndesVLConfig) -> dict[str, tuple[int, ...]]:
    """HF tensor name -> shape for a configuration, without allocating; a tied head is listed as releases may store it."""
    shapes = {name: shape for entry in entries(config) for name, shape in entry.shapes().items()}
    if config.text.tie_word_embeddings:
        shapes[TIED_HEAD] = shapes[EMBEDDING]
    return shapes


def _aimv2_names() -> dict[str, tuple[tuple[str, ...], str]]:
    root = "vision_encoder.preprocessor."
    block = "vision_encoder.trunk.blocks.{i}."
    names = {
        "vision.patch": ((root + "patchifier.proj.weight",), "conv"),
        "vision.patch_bias": ((root + "patchifier.proj.bias",), "plain"),
        "vision.patch_norm": ((root + "patchifier.norm.weight",), "plain"),
        "vision.table": ((root + "pos_embed",), "table"),
        "vision.norm": (("vision_encoder.trunk.post_trunk_norm.weight",), "plain"),
        "vision.layers.norm1": ((block + "norm_1.weight",), "plain"),
        "vision.layers.norm2": ((block + "norm_2.weight",), "plain"),
    }
    for leaf, module in (("qkv", "attn.qkv"), ("proj", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"), ("fc3", "mlp.fc3")):
        names[f"vision.layers.{leaf}"] = ((f"{block}{module}.weight",), "matrix")
        names[f"vision.layers.{leaf}_bias"] = ((f"{block}{module}.bias",), "plain")
    return names


def _siglip2_names() -> dict[str, tuple[tuple[str, ...], str]]:
    root = "vision_encoder.vision_model."
    layer = root + "encoder.layers.{i}."
    names = {
        "vision.patch": ((root + "embeddings.proj.weight",), "matrix"),
        "vision.patch_bias": ((root + "embeddings.proj.bias",), "plain"),
        "vision.table": ((root + "embeddings.pos_embed.weight",), "plain"),
        "vision.norm": ((root + "post_layernorm.weight",), "plain"),
        "vision.norm_bias": ((root + "post_layernorm.bias",), "plain"),
    }
    modules = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "proj": ("self_attn.out_proj",),
        "fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",),
    }  # fmt: skip
    for leaf, parts in modules.items():
        names[f"vision.layers.{leaf}"] = (tuple(f"{layer}{part}.weight" for part in parts), "matrix")
        names[f"vision.layers.{leaf}_bias"] = (tuple(f"{layer}{part}.bias" for part in parts), "plain")
    for leaf, module in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
        names[f"vision.layers.{leaf}"] = ((f"{layer}{module}.weight",), "plain")
        names[f"vision.layers.{leaf}_bias"] = ((f"{layer}{module}.bias",), "plain")
    return names


def _projector_names() -> dict[str, tuple[tuple[str, ...], str]]:
    return {
        "projector.fc1": (("mlp.0.weight",), "matrix"), "projector.fc1_bias": (("mlp.0.bias",), "plain"),
        "projector.fc2": (("mlp.2.weight",), "matrix"), "projector.fc2_bias": (("mlp.2.bias",), "plain"),
    }  # fmt: skip


def _decoder_names() -> dict[str, tuple[tuple[str, ...], str]]:
    root = "language_model.model."
    layer = root + "layers.{i}."
    names = {
        "decoder.embedding": ((EMBEDDING,), "plain"),
        "decoder.norm": ((root + "norm.weight",), "plain"),
        "decoder.head": ((TIED_HEAD,), "plain"),
        "decoder.layers.attention_norm": ((layer + "input_layernorm.weight",), "plain"),
        "decoder.layers.mlp_norm": ((layer + "post_attention_layernorm.weight",), "plain"),
        "decoder.layers.q_norm": ((layer + "self_attn.q_norm.weight",), "plain"),
        "decoder.layers.k_norm": ((layer + "self_attn.k_norm.weight",), "plain"),
    }
    for leaf in "qkvo":
        names[f"decoder.layers.{leaf}"] = ((f"{layer}self_attn.{leaf}_proj.weight",), "matrix")
        names[f"decoder.layers.{leaf}_bias"] = ((f"{layer}self_attn.{leaf}_proj.bias",), "plain")
    for leaf in ("gate", "up", "down"):
        names[f"decoder.layers.{leaf}"] = ((f"{layer}mlp.{leaf}_proj.weight",), "matrix")
    return names
