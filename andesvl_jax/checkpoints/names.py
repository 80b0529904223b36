"""The one map between this project's parameter tree and the tensor names of the HF layout.

Sources: state-dict names of the released checkpoints (tests/golden/keys). HF matrices are [out, in], ours [in, out].
"""

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from andesvl_jax.config import AndesVLConfig
from andesvl_jax.model.andesvl import describe
from andesvl_jax.weights import Param, is_param, path_name

TIED_HEAD = "language_model.lm_head.weight"


@dataclass(frozen=True)
class Entry:
    """One leaf of the tree and the HF tensors it is made of; several names are fused along the output axis."""

    path: str
    names: tuple[str, ...]  # with {i} where the leaf is stacked over layers
    kind: Literal["matrix", "conv", "plain", "table"]
    param: Param

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """HF name -> HF shape, for every layer."""
        layered = "{i}" in self.names[0]
        shape = self.param.shape[1:] if layered else self.param.shape
        if self.kind in ("matrix", "conv"):
            shape = shape[::-1]
        shape = (shape[0] // len(self.names), *shape[1:])
        if self.kind == "conv":
            side = int((shape[1] // 3) ** 0.5)
            shape = (shape[0], 3, side, side)
        if self.kind == "table":
            shape = (1, *shape)
        layers = range(self.param.shape[0]) if layered else (0,)
        return {name.format(i=i): shape for i in layers for name in self.names}

    def from_hf(self, read) -> np.ndarray:
        """read(name) -> array; joins, transposes and stacks to the leaf."""
        if "{i}" not in self.names[0]:
            return self._one(read, 0)
        return np.stack([self._one(read, i) for i in range(self.param.shape[0])])

    def _one(self, read, i: int) -> np.ndarray:
        x = np.concatenate([read(name.format(i=i)) for name in self.names])
        if self.kind in ("matrix", "conv"):
            return x.reshape(x.shape[0], -1).T
        return x[0] if self.kind == "table" else x

    def to_hf(self, leaf: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `from_hf`."""
        shapes = self.shapes()
        layers = leaf if "{i}" in self.names[0] else leaf[None]
        out = {}
        for i, x in enumerate(layers):
            x = x.T if self.kind in ("matrix", "conv") else x
            for name, part in zip(self.names, np.split(x, len(self.names)) if len(self.names) > 1 else [x], strict=True):
                name = name.format(i=i)
                out[name] = np.ascontiguousarray(part.reshape(shapes[name]))
        return out


def entries(config: AndesVLConfig) -> list[Entry]:
    """All leaves of the configuration with their HF names."""
    names = _aimv2_names() if config.vision.family == "aimv2" else _siglip2_names()
    names |= _projector_names() | _decoder_names()
    flat, _ = jax.tree_util.tree_flatten_with_path(describe(config), is_leaf=is_param)
    return [Entry(path_name(path), *names[path_name(path)], param) for path, param in flat]


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
        "decoder.embedding": ((root + "embed_tokens.weight",), "plain"),
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
