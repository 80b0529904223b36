"""LoRA adapters as PEFT directories, in and out: adapter_config.json and adapter_model.safetensors.

Letters: r rank, i and o input and output width. PEFT stores A as [r, i] and B as [o, r], one pair per linear module.
"""

import difflib
import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from andesvl_jax.checkpoints.json_file import read_json, write_json
from andesvl_jax.checkpoints.names import Entry, entries
from andesvl_jax.checkpoints.safetensors_file import list_tensors
from andesvl_jax.checkpoints.staging import replacing
from andesvl_jax.checkpoints.stored import FLOATS, Stored
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.errors import UserError
from andesvl_jax.model.andesvl import AndesVL
from andesvl_jax.weights import LoRA, dense, is_leaf, path_name

SETTINGS, TENSORS, BASE = "adapter_config.json", "adapter_model.safetensors", "andesvl_base.json"
DECODER = "language_model."  # in front of the decoder's modules; an adapter of the decoder alone has none
MAX_RANK = 4096
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")


@dataclass(frozen=True)
class Module:
    """One linear module of the HF layout: which part of which leaf it is."""

    entry: Entry
    layer: int
    part: int  # of the modules that are fused along the output axis

    @property
    def shape(self) -> tuple[int, int]:
        """(i, o)."""
        i, o = self.entry.param.shape[-2:]
        return i, o // len(self.entry.names)


def modules(config: AndesVLConfig) -> dict[str, Module]:
    """Every linear module by its HF name."""
    out = {}
    for entry in entries(config):
        if entry.kind != "matrix":
            continue
        for layer in range(entry.param.shape[0] if entry.param.stacked else 1):
            for part, name in enumerate(entry.names):
                out[name.format(i=layer).removesuffix(".weight")] = Module(entry, layer, part)
    return out


def base_hash(params: AndesVL) -> str:
    """sha256 of the weights below all adapters, floats rounded to bfloat16, so that it is the same for a checkpoint in any dtype
    it is loaded in. The layers must be stacked."""
    digest = hashlib.sha256()
    bases = jax.tree.map(lambda w: w.base if isinstance(w, LoRA) else w, params, is_leaf=is_leaf)
    for path, x in jax.tree_util.tree_flatten_with_path(bases)[0]:
        x = np.asarray(x)
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(ml_dtypes.bfloat16)
        digest.update(f"{path_name(path)} {x.dtype} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).view(np.uint8).data)
    return digest.hexdigest()


def save_adapter(params: AndesVL, config: AndesVLConfig, path: str | os.PathLike, base_name: str) -> None:
    """Writes the adapters of a tree as a PEFT directory, whole or not at all, with the hash of the base they were trained on.

    Args:
      base_name: what the base was loaded from, for the reader.
    Raises:
      UserError: no adapter in the tree, an adapter of a weight that is no linear module, or a stack of adapters; `path` holds
        something else, or the disk refuses.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    adapters = {path_name(p): leaf for p, leaf in flat if isinstance(leaf, LoRA)}
    if not adapters:
        raise UserError("the model has no adapter to save.")
    if any(leaf.ids is not None for leaf in adapters.values()):
        raise UserError("the model has a stack of adapters, expected one; save each by itself.")
    places = {name: module for name, module in modules(config).items() if module.entry.path in adapters}
    missing = set(adapters) - {module.entry.path for module in places.values()}
    if missing:
        raise UserError(f"weights {min(missing)}: an adapter of it has no place in the PEFT layout.")
    tensors, ranks, alphas = {}, {}, {}
    for name, module in places.items():
        a, b, scale = _pair(adapters[module.entry.path], module)
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(b.T)
        pattern = _pattern(module)
        ranks[pattern], alphas[pattern] = a.shape[1], scale * a.shape[1]
    rank, alpha = (max(values, key=list(values).count) for values in (ranks.values(), alphas.values()))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": f"({'|'.join(ranks)})",
        "rank_pattern": {pattern: r for pattern, r in ranks.items() if r != rank},
        "alpha_pattern": {pattern: a for pattern, a in alphas.items() if a != alpha},
    }
    with replacing(Path(path), "adapter", (SETTINGS, TENSORS)) as staging:
        save_file(tensors, staging / TENSORS, {"format": "pt"})
        write_json(staging / SETTINGS, settings)
        write_json(staging / BASE, {"base_sha256": base_hash(params)})


def load_adapter(params: AndesVL, config: AndesVLConfig, path: str | os.PathLike) -> AndesVL:
    """Parameters with the adapters of a PEFT directory over them. The layers must be stacked.

    Ranks may differ between modules (they are padded), some layers may have none, and the three modules of a fused q, k and v
    become one adapter of their ranks together.

    Raises:
      UserError: no such files, another kind of adapter, a module that the model lacks, half of a pair, a rank, shape or dtype
        that does not fit, numbers that are not finite, weights that have adapters already, or an adapter for another base.
    """
    path = Path(path)
    settings = _settings(path)
    pairs = _pairs(path, config, settings)
    if (path / BASE).exists():
        wanted, found = str(read_json(path / BASE).get("base_sha256")), base_hash(params)
        if wanted != found:
            raise UserError(
                f"{path}: an adapter for the base {wanted[:12]}, found a model with hash {found[:12]}; load that base."
            )

    by_leaf: dict[str, list["Pair"]] = {}
    for module, *halves in pairs:
        by_leaf.setdefault(module.entry.path, []).append((module, *halves))

    def adapt(leaf_path, w):
        name = path_name(leaf_path)
        if name not in by_leaf:
            return w
        if isinstance(w, LoRA):
            raise UserError(f"{path}: {name} has an adapter already, expected a model without one; merge it first.")
        return _leaf(w, by_leaf[name])

    return jax.tree_util.tree_map_with_path(adapt, params, is_leaf=is_leaf)


def _pair(leaf: LoRA, module: Module) -> tuple[np.ndarray, np.ndarray, float]:
    """a [i, r], b [r, o] and the scale of one module."""
    a, b, scale = (np.asarray(x, np.float32) for x in (leaf.a, leaf.b, leaf.scale))
    if module.entry.param.stacked:
        a, b, scale = a[module.layer], b[module.layer], scale[module.layer]
    width = module.shape[1]
    return a, b[:, module.part * width : (module.part + 1) * width], float(scale)


def _pattern(module: Module) -> str:
    """A regular expression of the names of this module in every layer, of the whole model or its decoder alone."""
    name = module.entry.names[module.part].removesuffix(".weight")
    pattern = re.escape(name).replace(re.escape("{i}"), r"\d+")
    return pattern.replace(re.escape(DECODER), f"({re.escape(DECODER)})?", 1) if name.startswith(DECODER) else pattern


def _settings(path: Path) -> dict[str, Any]:
    if not (path / SETTINGS).is_file():
        raise UserError(f"{path}: has no {SETTINGS}, expected a PEFT adapter directory.")
    settings = read_json(path / SETTINGS)
    plain = {"peft_type": "LORA", "use_dora": False, "bias": "none", "modules_to_save": None, "fan_in_fan_out": False}
    for field, expected in plain.items():
        if settings.get(field) not in (expected, None) or (field == "peft_type" and settings.get(field) is None):
            raise UserError(f"{path / SETTINGS}: {field} is {settings.get(field)!r:.60}, expected {expected!r}.")
    if not (path / TENSORS).is_file():
        found = "adapter_model.bin, a pickle" if (path / "adapter_model.bin").exists() else "no weights"
        raise UserError(f"{path}: found {found}, expected {TENSORS}.")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(field) or {}
        if not isinstance(patterns, dict) or not all(_is_regex(key) for key in patterns):
            raise UserError(f"{path / SETTINGS}: {field} is not a map from module patterns to numbers.")
    return settings


def _is_regex(text: str) -> bool:
    """Whether it is a regular expression that cannot take for ever: nothing repeats but digits."""
    try:
        re.compile(text)
    except re.error:
        return False
    return len(text) < 10_000 and not re.search(r"[*+{]", text.replace(r"\d+", ""))


Pair = tuple[Module, np.ndarray, np.ndarray, float]


def _pairs(path: Path, config: AndesVLConfig, settings: dict[str, Any]) -> Iterator[Pair]:
    """(module, a [i, r], b [r, o], scale), all names and shapes checked before the first is read."""
    known, file = modules(config), path / TENSORS
    found: dict[str, dict[str, Stored]] = {}
    for name, tensor in list_tensors(file).items():
        match = _TENSOR.fullmatch(name)
        module = None if match is None else match["module"] if match["module"] in known else DECODER + match["module"]
        if match is None or module not in known:
            near = difflib.get_close_matches(name if match is None else match["module"], known, 1, cutoff=0)[0]
            raise UserError(f"{file}: unknown tensor {name[:120]!r}, expected lora_A and lora_B of modules such as {near}.")
        found.setdefault(module, {})[match["half"]] = tensor
    if not found:
        raise UserError(f"{file}: holds no adapter.")
    checked = []
    for name, halves in found.items():
        if set(halves) != {"A", "B"}:
            raise UserError(f"{file}: {name} has lora_{min(halves)} alone, expected both halves.")
        module, (a, b) = known[name], (halves["A"], halves["B"])
        rank = _number(settings, "r", "rank_pattern", name, path)
        alpha = _number(settings, "lora_alpha", "alpha_pattern", name, path)
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            raise UserError(f"{path / SETTINGS}: the rank of {name} is {rank!r}, expected a whole number from 1 to {MAX_RANK}.")
        i, o = module.shape
        if a.shape != (rank, i) or b.shape != (o, rank):
            raise UserError(
                f"{file}: {name} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, expected {[rank, i]} and {[o, rank]}."
            )
        if a.dtype not in FLOATS or b.dtype not in FLOATS:
            raise UserError(f"{file}: {name} has type {a.dtype} and {b.dtype}, expected one of {', '.join(FLOATS)}.")
        checked.append((name, module, a, b, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)))
    for name, module, a, b, scale in checked:
        arrays = [np.asarray(x.view(), np.float32).T for x in (a, b)]
        if not all(np.isfinite(x).all() for x in arrays):
            raise UserError(f"{file}: {name} holds numbers that are not finite.")
        yield module, *arrays, scale


def _number(settings: dict[str, Any], field: str, patterns: str, module: str, path: Path):
    """The value for a module, as PEFT finds it: that of the first pattern that ends its name."""
    names = [module, module.removeprefix(DECODER)]

    def matches(key: str) -> bool:
        return any(re.match(rf"(.*\.)?({key})$", name) for name in names)

    value = next((v for key, v in (settings.get(patterns) or {}).items() if matches(key)), settings.get(field))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{path / SETTINGS}: {field} of {module} is {value!r:.60}, expected a number.")
    return value


def _leaf(base, parts: list[Pair]) -> LoRA:
    """One leaf's adapter out of those of its modules, zero where a layer has none."""
    *lead, i, o = jax.eval_shape(dense, base).shape
    fused = len(parts[0][0].entry.names)
    largest = max(a.shape[1] for _, a, _, _ in parts)
    a_all = np.zeros((*(lead or [1]), i, largest * fused), np.float32)
    b_all = np.zeros((*(lead or [1]), largest * fused, o), np.float32)
    scales = np.ones((lead or [1])[0], np.float32)
    for module, a, b, scale in parts:
        rank, width, first = a.shape[1], b.shape[1], module.part * largest
        if fused == 1:
            scales[module.layer] = scale
        else:  # one scale a layer: modules of a fused leaf may have different ones
            b = b * np.float32(scale)
        a_all[module.layer, :, first : first + rank] = a
        b_all[module.layer, first : first + rank, module.part * width : (module.part + 1) * width] = b
    if not lead:
        a_all, b_all, scales = a_all[0], b_all[0], scales[0]
    return LoRA(base, jnp.asarray(a_all), jnp.asarray(b_all), jnp.asarray(scales))
