"""Packed leaves on disk: which tensors stand for one, and how their bytes go in and out.

Integer schemes take the "pack-quantized" layout of the package compressed-tensors, so that its readers know them; other schemes
have this project's own. A linear module X of the HF layout, weights [out, in], has

    int8, int4   X.weight_packed int32 [out, ceil(in * bits / 32)], codes + 2^(bits - 1) from the lowest bits up;
                 X.weight_scale float32 [out, in / group]; X.weight_shape int64 [2] = [out, in]
    ternary      X.weight_codes uint8 [out, ceil(in / 5)], five codes + 1 a byte as digits in base 3, the earliest lowest;
                 X.weight_scale float32 [out, in / group]

The embedding is stored alike under its own name. recipe.json holds the recipe: which weights have which scheme.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from andesvl_jax.checkpoints.json_file import read_json, write_json
from andesvl_jax.checkpoints.names import Entry
from andesvl_jax.checkpoints.stored import Stored
from andesvl_jax.errors import UserError
from andesvl_jax.weights import SCHEMES, Int4, Int8, Packed, Param, Quantize, Recipe, Rule, Scheme

RECIPE, FORMAT = "recipe.json", "andesvl recipe 1"
INTEGER_BITS = {Int8: 8, Int4: 4}  # schemes in the layout of compressed-tensors
Spec = tuple[np.dtype, tuple[int, ...]]


def packed_specs(entry: Entry, described: Packed) -> dict[str, Spec]:
    """Name -> (dtype, shape) of every tensor on disk that stands for a leaf."""
    layers = entry.param.shape[0] if entry.param.stacked else 1
    rows, n = _rows(entry, described)
    out: dict[str, Spec] = {}
    for layer in range(layers):
        for name in entry.names:
            for suffix, spec in _suffixes(described, rows, n).items():
                out[name.format(i=layer) + suffix] = spec
    return out


def packed_to_hf(entry: Entry, leaf: Packed) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors in the order of `packed_specs`, made one at a time."""
    rows, n = _rows(entry, leaf)
    arrays = {name: np.asarray(x) for name, x in leaf.arrays.items()}
    for layer in range(entry.param.shape[0] if entry.param.stacked else 1):
        of_layer = {name: x[layer] if entry.param.stacked else x for name, x in arrays.items()}
        if leaf.axis == -2:
            of_layer = {name: x.T for name, x in of_layer.items()}
        for part, name in enumerate(entry.names):
            mine = {key: x[part * rows : (part + 1) * rows] for key, x in of_layer.items()}
            base = name.format(i=layer)
            codes = np.ascontiguousarray(mine["codes"])
            if type(leaf.scheme) in INTEGER_BITS:
                yield f"{base}_packed", _to_words(codes, leaf.scheme)
                yield f"{base}_scale", np.ascontiguousarray(mine["scale"])
                yield f"{base}_shape", np.array([rows, n], np.int64)
            else:
                yield f"{base}_codes", codes
                yield f"{base}_scale", np.ascontiguousarray(mine["scale"])


def read_packed(entry: Entry, described: Packed, found: Mapping[str, Stored], path: Path) -> Packed:
    """The leaf with NumPy arrays, in the layout of the parameter tree.

    Raises:
      UserError: codes that no encoder writes, or a scale that is not finite.
    """
    rows, n = _rows(entry, described)
    arrays = {
        name: np.empty(p.shape, p.dtype)
        for name, p in described.arrays.items()  # small: a share of the dense weight
    }
    for layer in range(entry.param.shape[0] if entry.param.stacked else 1):
        of_layer = {name: x[layer] if entry.param.stacked else x for name, x in arrays.items()}
        for part, name in enumerate(entry.names):
            base = name.format(i=layer)
            if type(described.scheme) in INTEGER_BITS:
                width = arrays["codes"].shape[described.axis]
                codes = _from_words(found[f"{base}_packed"].view(), described.scheme, width)
            else:
                codes = found[f"{base}_codes"].view()
            values = {"codes": codes, "scale": np.asarray(found[f"{base}_scale"].view(), np.float32)}
            fault = described.scheme.fault(values)
            if fault is not None:
                raise UserError(f"{path}: {base} holds {fault}, expected codes of scheme {described.scheme.name}.")
            for key, value in values.items():
                out = of_layer[key] if described.axis == -1 else of_layer[key].T
                out[part * rows : (part + 1) * rows] = value
    return described.replace(arrays=arrays)


def _rows(entry: Entry, leaf: Packed) -> tuple[int, int]:
    """(output rows of one HF tensor, weights of a row)."""
    n, rows = leaf.shape[leaf.axis], leaf.shape[-1 if leaf.axis == -2 else -2]
    return rows // len(entry.names), n


def _suffixes(leaf: Packed, rows: int, n: int) -> dict[str, Spec]:
    shape = {name: (rows, x.shape[leaf.axis]) for name, x in leaf.arrays.items()}
    scale = {"_scale": (np.dtype(np.float32), shape["scale"])}
    bits = INTEGER_BITS.get(type(leaf.scheme))
    if bits is None:
        return {"_codes": (np.dtype(np.uint8), shape["codes"])} | scale
    words = {"_packed": (np.dtype(np.int32), (rows, -(-n * bits // 32)))}
    return words | scale | {"_shape": (np.dtype(np.int64), (2,))}


def _flip(scheme: Scheme) -> np.uint8:
    """Two's complement <-> offset binary: the highest bit of every code of a byte."""
    return np.uint8(0x80 if INTEGER_BITS[type(scheme)] == 8 else 0x88)


def _to_words(codes: np.ndarray, scheme: Scheme) -> np.ndarray:
    raw = codes.view(np.uint8) ^ _flip(scheme)
    padded = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 4)))
    return np.ascontiguousarray(padded).view("<i4").astype(np.int32, copy=False)


def _from_words(words: np.ndarray, scheme: Scheme, width: int) -> np.ndarray:
    raw = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)[:, :width] ^ _flip(scheme)
    return raw.view(np.int8) if isinstance(scheme, Int8) else raw


# ---- the recipe of a directory


def write_recipe(directory: Path, leaves: Mapping[str, tuple[Entry, Any]]) -> None:
    """recipe.json: every packed weight by its path, so that reading it runs no pattern of a file."""
    weights = {
        path: {"scheme": leaf.scheme.name, "group": leaf.scheme.group, "axis": leaf.axis}
        for path, (_, leaf) in leaves.items()
        if isinstance(leaf, Packed)
    }
    write_json(directory / RECIPE, {"format": FORMAT, "weights": weights})


def read_recipe(directory: Path) -> Recipe | None:
    """The recipe that a directory was packed by; None where there is no recipe.json.

    Raises:
      UserError: a damaged file, an unknown scheme, or an unknown field.
    """
    file = directory / RECIPE
    if not file.exists():
        return None
    raw = read_json(file)
    if raw.get("format") != FORMAT or not isinstance(raw.get("weights"), dict) or set(raw) != {"format", "weights"}:
        raise UserError(f"{file}: expected format {FORMAT!r} and a map of weights, nothing else.")
    return Recipe(tuple(_rule(path, entry, file) for path, entry in raw["weights"].items()))


def _rule(path: str, raw: Any, file: Path) -> Rule:
    fields = {"scheme", "group", "axis"}
    if not isinstance(raw, dict) or set(raw) != fields:
        found = sorted(raw) if isinstance(raw, dict) else raw
        raise UserError(f"{file}: {path[:80]} has {found!r:.80}, expected the fields {', '.join(sorted(fields))}.")
    if raw["scheme"] not in SCHEMES:
        raise UserError(f"{file}: scheme of {path[:80]} is {raw['scheme']!r:.60}, expected one of {', '.join(SCHEMES)}.")
    group, axis = raw["group"], raw["axis"]
    if axis not in (-1, -2) or not (group is None or (type(group) is int and group > 0)):
        raise UserError(
            f"{file}: {path[:80]} has axis {axis!r:.20} and group {group!r:.20}, expected -1 or -2, and a size or null."
        )
    return Rule(re.escape(path), Quantize(SCHEMES[raw["scheme"]](group), axis))


def recipe_of_tensors(found: Mapping[str, Stored], described: Mapping[str, tuple[Entry, Param]], path: Path) -> Recipe | None:
    """The recipe of a directory that others packed: bits and groups follow from the shapes of its `weight_packed` tensors."""
    rules = []
    for leaf_path, (entry, param) in described.items():
        name = entry.names[0].format(i=0)
        if f"{name}_packed" not in found:
            continue
        axis = -2 if entry.kind == "matrix" else -1
        n = param.shape[axis]
        words, scale = (found[f"{name}_packed"].shape, found[f"{name}_scale"].shape if f"{name}_scale" in found else ())
        bits = next((b for b in INTEGER_BITS.values() if len(words) == 2 and words[1] == -(-n * b // 32)), None)
        if bits is None or len(scale) != 2 or scale[1] < 1 or n % scale[1]:
            raise UserError(
                f"{path}: {name}_packed has shape {list(words)} and its scale {list(scale)}, expected symmetric codes of 4 or 8 "
                f"bits for {n} weights a row."
            )
        scheme = {b: kind for kind, b in INTEGER_BITS.items()}[bits](None if scale[1] == 1 else n // scale[1])
        rules.append(Rule(re.escape(leaf_path), Quantize(scheme, axis)))
    return Recipe(tuple(rules)) if rules else None


def quantization_config(leaves: Mapping[str, tuple[Entry, Any]]) -> dict[str, Any]:
    """What config.json says of packed weights: the format of compressed-tensors where every scheme is one of its own."""
    groups: dict[Scheme, list[str]] = {}
    for entry, leaf in leaves.values():
        if isinstance(leaf, Packed):
            names = [re.escape(n.removesuffix(".weight")).replace(re.escape("{i}"), r"\d+") for n in entry.names]
            groups.setdefault(leaf.scheme, []).extend(f"re:{name}" for name in names)
    if not all(type(scheme) in INTEGER_BITS for scheme in groups):
        return {"quant_method": "andesvl", "format": "mixed", "recipe": RECIPE}
    config_groups = {
        f"group_{number}": {"targets": targets, "weights": _weights(scheme)}
        for number, (scheme, targets) in enumerate(groups.items())
    }
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": config_groups, "ignore": [],
    }  # fmt: skip


def _weights(scheme: Scheme) -> dict[str, Any]:
    grouped = {"strategy": "channel"} if scheme.group is None else {"strategy": "group", "group_size": scheme.group}
    return {"num_bits": INTEGER_BITS[type(scheme)], "type": "int", "symmetric": True, "dynamic": False} | grouped


def placed(leaf: Packed, described: Packed, sharding) -> Packed:
    """The leaf on its devices: sharding(param) for each of its arrays; None: on the default one."""
    at = {name: None if sharding is None else sharding(param) for name, param in described.arrays.items()}
    return leaf.replace(arrays={name: jax.device_put(x, at[name]) for name, x in leaf.arrays.items()})
