"""Frozen configurations of the network: the four released sizes, three small ones of this project, HF `config.json` in and out.

Sources: public config of OPPOer/AndesVL-2B-Instruct (text_config, vision_config), the public Qwen3 configs, and the
parameter counts of arXiv 2510.11496. Values the releases do not publish are marked "inferred" beside the field.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Mapping

from andesvl_jax.errors import UserError

AIMV2_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP statistics, preprocessor_config.json of the release
AIMV2_STD = (0.26862954, 0.26130258, 0.27577711)
ATTENTION_BACKENDS = ("auto", "splash", "chunked", "einsum")
MODEL_TYPES = {"andesvl-aimv2-qwen3": "aimv2", "andesvl-siglip2-qwen3": "siglip2"}


@dataclass(frozen=True)
class VisionConfig:
    """Native-resolution encoder. Widths are in channels, `image_size` and `window_size` in pixels."""

    family: Literal["aimv2", "siglip2"] = "aimv2"
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_layers: int = 24
    num_heads: int = 8
    num_channels: int = 3
    patch_size: int = 14
    table_side: int | None = 32  # learned position table of table_side^2 entries; None: no table (inferred for the releases)
    table_interpolation: Literal["two_dim", "one_dim"] = "two_dim"
    use_rope: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"
    qkv_bias: bool = False
    use_bias: bool = False
    merge_size: int = 2  # hidden_stride: merge_size^2 patches become one visual token
    window_size: int = 112
    full_attention_layers: tuple[int, ...] | None = None  # None: every layer sees its whole image

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_features(self) -> int:
        return self.num_channels * self.patch_size**2

    @property
    def base(self) -> int:
        """Side in pixels of the square that becomes one visual token."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class TextConfig:
    """Qwen3 decoder; `qk_norm=False` with `attention_bias=False` is the Llama block."""

    vocab_size: int = 151936
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_layers: int = 28
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128  # independent of hidden_size / num_heads
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qk_norm: bool = True
    attention_bias: bool = False
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 40960


@dataclass(frozen=True)
class AndesVLConfig:
    """The whole network and how it is run: `dtype` is the compute type, `param_dtype` what the weights are held in."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_id: int | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: Literal["auto", "splash", "chunked", "einsum"] = "auto"  # auto: splash on TPU, chunked elsewhere; einsum: T x T
    attention_chunk: int = 512  # queries per block of the chunked backend
    remat: Literal["none", "layer", "dots"] = "none"  # what the backward pass recomputes: nothing, whole layers, all but matmuls
    layer_loop: Literal["scan", "unroll"] = "scan"  # the layers are stacked, or a tuple (`unstack_layers`)

    def __post_init__(self):
        _check(self)

    def replace(self, **changes) -> "AndesVLConfig":
        return dataclasses.replace(self, **changes)


def _check(config: AndesVLConfig) -> None:
    vision, text = config.vision, config.text

    def require(holds: bool, name: str, found, expected: str) -> None:
        if not holds:
            raise UserError(f"config field {name}: found {found!r}, expected {expected}.")

    for part, values in (("vision", vision), ("text", text), ("", config)):
        for item in dataclasses.fields(values):
            found = getattr(values, item.name)
            kinds = {int: (int,), float: (int, float), bool: (bool,)}.get(item.type)
            name, expected = f"{part}.{item.name}".lstrip("."), f"a value of type {getattr(item.type, '__name__', '')}"
            require(kinds is None or type(found) in kinds, name, found, expected)
    for part, values in (("vision", vision), ("text", text)):
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "norm_eps", "rope_theta"):
            require(getattr(values, name) > 0, f"{part}.{name}", getattr(values, name), "a positive number")
    require(vision.family in ("aimv2", "siglip2"), "vision.family", vision.family, "'aimv2' or 'siglip2'")
    require(vision.patch_size > 0, "vision.patch_size", vision.patch_size, "a positive number of pixels")
    require(vision.num_channels == 3, "vision.num_channels", vision.num_channels, "3 (RGB)")
    require(vision.merge_size == 2, "vision.merge_size", vision.merge_size, "2 (the only merge AndesVL has)")
    require(
        vision.hidden_size % (4 * vision.num_heads) == 0,
        "vision.hidden_size",
        vision.hidden_size,
        f"a multiple of 4 x num_heads = {4 * vision.num_heads}, because 2-D RoPE splits each head in four",
    )
    require(
        vision.hidden_act in ("silu", "gelu", "gelu_pytorch_tanh"),
        "vision.hidden_act",
        vision.hidden_act,
        "'silu', 'gelu' or 'gelu_pytorch_tanh'",
    )
    require(
        vision.table_interpolation in ("two_dim", "one_dim"),
        "vision.table_interpolation",
        vision.table_interpolation,
        "'two_dim' or 'one_dim'",
    )
    require(
        vision.table_side is None or (type(vision.table_side) is int and vision.table_side > 0),
        "vision.table_side",
        vision.table_side,
        "None or a positive number of entries (image_size / patch_size in config.json)",
    )
    full = vision.full_attention_layers
    require(
        full is None or (type(full) is tuple and all(type(i) is int and 0 <= i < vision.num_layers for i in full)),
        "vision.full_attention_layers",
        full,
        f"None or a tuple of layer numbers below {vision.num_layers}",
    )
    require(
        full is None or vision.window_size >= vision.base,
        "vision.window_size",
        vision.window_size,
        f"at least {vision.base} pixels, one visual token",
    )
    require(text.vocab_size > 0, "text.vocab_size", text.vocab_size, "a positive number")
    require(
        text.head_dim > 0 and text.head_dim % 2 == 0,
        "text.head_dim",
        text.head_dim,
        "an even number, because RoPE pairs its halves",
    )
    require(
        text.num_kv_heads > 0 and text.num_heads % text.num_kv_heads == 0,
        "text.num_kv_heads",
        text.num_kv_heads,
        f"a divisor of num_heads = {text.num_heads}",
    )
    require(text.max_position_embeddings > 0, "text.max_position_embeddings", text.max_position_embeddings, "a positive number")
    require(
        config.image_token_id is None or 0 <= config.image_token_id < text.vocab_size,
        "image_token_id",
        config.image_token_id,
        f"an id below vocab_size = {text.vocab_size}",
    )
    require(config.attention in ATTENTION_BACKENDS, "attention", config.attention, f"one of {', '.join(ATTENTION_BACKENDS)}")
    require(config.attention_chunk > 0, "attention_chunk", config.attention_chunk, "a positive number of queries")
    require(config.layer_loop in ("scan", "unroll"), "layer_loop", config.layer_loop, "'scan' or 'unroll'")
    require(config.remat in ("none", "layer", "dots"), "remat", config.remat, "'none', 'layer' or 'dots'")
    for name in ("dtype", "param_dtype"):
        require(getattr(config, name) in ("float32", "bfloat16"), name, getattr(config, name), "'float32' or 'bfloat16'")


SIGLIP2_BASE = VisionConfig(
    family="siglip2", hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12, patch_size=16, norm_eps=1e-6,
    hidden_act="gelu_pytorch_tanh", qkv_bias=True, use_bias=True,
)  # fmt: skip
QWEN3_0_6B = TextConfig()
QWEN3_1_7B = TextConfig(hidden_size=2048, intermediate_size=6144)
QWEN3_4B = TextConfig(hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32)

CONFIGS: dict[str, AndesVLConfig] = {
    "andesvl-0.6b": AndesVLConfig(vision=SIGLIP2_BASE, text=QWEN3_0_6B),
    "andesvl-1b": AndesVLConfig(text=QWEN3_0_6B),
    "andesvl-2b": AndesVLConfig(text=QWEN3_1_7B),
    "andesvl-4b": AndesVLConfig(text=QWEN3_4B),
    "nano": AndesVLConfig(
        vision=VisionConfig(hidden_size=192, intermediate_size=528, num_layers=6, num_heads=3, table_side=8),
        text=TextConfig(
            vocab_size=6144, hidden_size=256, intermediate_size=704, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=64,
            rope_theta=1e4, max_position_embeddings=4096,
        ),
    ),
    "nano-siglip": AndesVLConfig(
        vision=VisionConfig(
            family="siglip2", hidden_size=128, intermediate_size=512, num_layers=5, num_heads=2, table_side=8, norm_eps=1e-6,
            hidden_act="gelu_pytorch_tanh", qkv_bias=True, use_bias=True,
        ),
        text=TextConfig(
            vocab_size=6144, hidden_size=192, intermediate_size=512, num_layers=5, num_heads=3, num_kv_heads=1, head_dim=64,
            rope_theta=1e4, max_position_embeddings=4096,
        ),
    ),
    "pico": AndesVLConfig(
        vision=VisionConfig(hidden_size=128, intermediate_size=352, num_layers=3, num_heads=4, table_side=8),
        text=TextConfig(
            vocab_size=4122, hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
            rope_theta=1e4, max_position_embeddings=2048,
        ),
    ),
}  # fmt: skip

# HF text_config key -> field of TextConfig; keys that only carry the torch runtime's defaults are accepted at that value alone.
_TEXT_KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim", "rope_theta": "rope_theta", "rms_norm_eps": "norm_eps", "attention_bias": "attention_bias",
    "tie_word_embeddings": "tie_word_embeddings", "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip
_TEXT_FIXED = {
    "hidden_act": "silu", "rope_scaling": None, "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None,
}  # fmt: skip
_TEXT_IGNORED = {
    "architectures", "model_type", "max_window_layers", "initializer_range", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "torch_dtype", "dtype", "transformers_version", "rope_parameters", "layer_types", "mlp_bias", "_name_or_path",
}  # fmt: skip
_VISION_KEYS = {
    "hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads", "num_channels": "num_channels", "patch_size": "patch_size",
    "rms_norm_eps": "norm_eps", "layer_norm_eps": "norm_eps", "rope_theta": "rope_theta", "hidden_act": "hidden_act",
    "qkv_bias": "qkv_bias", "use_bias": "use_bias", "hidden_stride": "merge_size", "window_size": "window_size",
    "interpolate_pe_method": "table_interpolation",
}  # fmt: skip
_VISION_FIXED = {"attention_dropout": 0.0, "projection_dropout": 0.0, "temporal_patch_size": 1}
_VISION_HANDLED = {
    "image_size", "num_patches", "preserve_original_pe", "disable_rope", "fullatt_block_indexes",
}  # fmt: skip
_VISION_IGNORED = {
    "model_type", "architectures", "min_pixels", "max_pixels", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
}  # fmt: skip
_TOP_IGNORED = {
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "bos_token_id", "eos_token_id",
    "pad_token_id", "use_cache", "quantization_config",
}  # fmt: skip


def from_hf(raw: Mapping[str, Any], source: str = "config.json", **run_options) -> AndesVLConfig:
    """Reads a parsed HF `config.json`; class defaults of the release's configuration files fill what is absent.

    Args:
      raw: the parsed JSON object; `source` names it in errors; `run_options` are fields of AndesVLConfig (dtype, remat, ...).
    Raises:
      UserError: unknown model_type or key, a value the network cannot honour, or an impossible combination.
    """
    try:
        model_type = raw.get("model_type")
        if model_type not in sorted(MODEL_TYPES):
            raise UserError(f"model_type is {model_type!r}, expected one of {sorted(MODEL_TYPES)}.")
        _refuse_unknown(raw, {"model_type", "text_config", "vision_config", "image_token_id", "qk_norm"} | _TOP_IGNORED, "")
        for part in ("text_config", "vision_config"):
            if not isinstance(raw.get(part), Mapping):
                raise UserError(f"{part} is {raw.get(part)!r}, expected an object.")
        return AndesVLConfig(
            vision=_vision_from_hf(raw["vision_config"], MODEL_TYPES[model_type]),
            text=_text_from_hf(raw["text_config"], qk_norm=raw.get("qk_norm", True)),
            **{"image_token_id": raw.get("image_token_id"), **run_options},
        )
    except TypeError as error:
        raise UserError(f"{source}: a field has a value of the wrong type ({error}).") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def to_hf(config: AndesVLConfig) -> dict[str, Any]:
    """The inverse of `from_hf`: a JSON-ready dict in the layout of the releases."""
    vision, text = config.vision, config.text
    names = {v: k for k, v in _VISION_KEYS.items() if (k != "rms_norm_eps") == (vision.family == "siglip2") or v != "norm_eps"}
    aimv2 = vision.family == "aimv2"
    vision_raw = {hf: getattr(vision, name) for name, hf in names.items()}
    vision_raw |= {
        "model_type": "aimv2" if aimv2 else "siglip2_navit_rope_model",
        "preserve_original_pe": vision.table_side is not None,
        "disable_rope": not vision.use_rope,
        "fullatt_block_indexes": None if vision.full_attention_layers is None else list(vision.full_attention_layers),
    }
    if aimv2:
        vision_raw["image_size"] = (vision.table_side or 1) * vision.patch_size
    else:
        vision_raw["num_patches"] = (vision.table_side or 1) ** 2
    text_raw = {hf: getattr(text, name) for hf, name in _TEXT_KEYS.items()} | _TEXT_FIXED
    raw = {
        "architectures": ["AndesVLForConditionalGeneration"],
        "model_type": f"andesvl-{vision.family}-qwen3",
        "torch_dtype": config.param_dtype,
        "text_config": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **text_raw},
        "vision_config": vision_raw,
    }
    if config.image_token_id is not None:
        raw["image_token_id"] = config.image_token_id
    if not text.qk_norm:
        raw["qk_norm"] = False
    return raw


def _refuse_unknown(raw: Mapping[str, Any], known: set[str], part: str) -> None:
    unknown = sorted(set(raw) - known)
    if unknown:
        raise UserError(f"{part}unknown key {unknown[0]!r}; expected one of {', '.join(sorted(known))}.")


def _refuse_changed(raw: Mapping[str, Any], fixed: Mapping[str, Any], part: str) -> None:
    for key, value in fixed.items():
        if raw.get(key, value) != value:
            raise UserError(f"{part}{key} is {raw[key]!r}, expected {value!r}; this network has no other form.")


def _text_from_hf(raw: Mapping[str, Any], qk_norm: bool) -> TextConfig:
    part = "text_config: "
    _refuse_unknown(raw, set(_TEXT_KEYS) | set(_TEXT_FIXED) | _TEXT_IGNORED, part)
    _refuse_changed(raw, _TEXT_FIXED, part)
    _refuse_changed(raw, {"mlp_bias": False, "layer_types": ["full_attention"] * len(raw.get("layer_types", ()))}, part)
    values = {name: raw[hf] for hf, name in _TEXT_KEYS.items() if hf in raw}
    rope = raw.get("rope_parameters") or {}  # the layout of transformers >= 5
    _refuse_changed(rope, {"rope_type": "default"}, f"{part}rope_parameters.")
    if "rope_theta" in rope:
        theta = raw.get("rope_theta", rope["rope_theta"])
        if theta != rope["rope_theta"]:
            raise UserError(f"{part}rope_theta is {theta} and in rope_parameters {rope['rope_theta']}, expected one value.")
        values["rope_theta"] = theta
    return TextConfig(**values, qk_norm=qk_norm)


def _vision_from_hf(raw: Mapping[str, Any], family: str) -> VisionConfig:
    part = "vision_config: "
    _refuse_unknown(raw, set(_VISION_KEYS) | set(_VISION_FIXED) | _VISION_HANDLED | _VISION_IGNORED, part)
    _refuse_changed(raw, _VISION_FIXED, part)
    aimv2 = family == "aimv2"
    # Class defaults of the release's configuration files; they differ from the released values, which config.json holds.
    defaults = dataclasses.asdict(VisionConfig(table_interpolation="one_dim") if aimv2 else SIGLIP2_BASE)
    patch = raw.get("patch_size", defaults["patch_size"])
    if aimv2:
        keeps_table = raw.get("preserve_original_pe", False)
        side = raw.get("image_size", 224) // max(patch, 1)  # a patch below 1 is refused with the other fields
    else:
        keeps_table = raw.get("preserve_original_pe", True)
        side = round(raw.get("num_patches", 1024) ** 0.5)
        if side * side != raw.get("num_patches", 1024):
            raise UserError(f"{part}num_patches is {raw['num_patches']}, expected a square number.")
    values = {name: raw[hf] for hf, name in _VISION_KEYS.items() if hf in raw}
    full = raw.get("fullatt_block_indexes")
    values |= {
        "table_side": side if keeps_table else None,
        "use_rope": not raw.get("disable_rope", False),
        "full_attention_layers": None if full is None else tuple(full),
    }
    return VisionConfig(**(defaults | values))
