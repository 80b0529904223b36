"""The published network a second time, in float64 NumPy: one image, one head and one position after another.

Written from the published architecture (AIMv2, SigLIP2 with 2-D RoPE, Qwen3), over HF tensor names, with nothing of
andesvl_jax but its configuration dataclasses. It serves the settings that the stored golden sets do not have (other epsilons,
thetas, windows, biases, untied heads, ...), and is held to those sets itself in tests/model/test_golden.py.

P patches, C vision width, D decoder width, T tokens, V vocabulary.
"""

import math

import numpy as np

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
}


def activations(config, tensors, input_ids, canvases=(), mean=(0.5,) * 3, std=(0.5,) * 3) -> dict[str, np.ndarray]:
    """float64 values under the names of `probe` (without canvases), of one prompt.

    Args:
      tensors: HF name -> array; canvases: uint8 [H, W, 3]; mean, std: per RGB channel.
    """
    w = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    out = {}
    x = w["language_model.model.embed_tokens.weight"][np.asarray(input_ids)]
    if len(canvases):
        side = config.vision.patch_size
        flat = [_flatten(canvas, side, mean, std) for canvas in canvases]
        grids = [(canvas.shape[0] // side, canvas.shape[1] // side) for canvas in canvases]
        embedded = [_embed(config.vision, w, patches, grid) for patches, grid in zip(flat, grids, strict=True)]
        encoded = [_encode(config.vision, w, e, grid) for e, grid in zip(embedded, grids, strict=True)]
        merged = np.concatenate(encoded).reshape(-1, 4 * config.vision.hidden_size)
        hidden = ACTIVATIONS["gelu"](_linear(w, "mlp.0", merged))
        out = {
            "flat_patches": np.concatenate(flat), "grid_hw": np.array(grids), "patch_embeds": np.concatenate(embedded),
            "vit_embeds": np.concatenate(encoded), "proj_embeds": _linear(w, "mlp.2", hidden),
        }  # fmt: skip
        x[np.asarray(input_ids) == config.image_token_id] = out["proj_embeds"]
    hidden = _decode(config.text, w, x)
    head = "language_model.model.embed_tokens" if config.text.tie_word_embeddings else "language_model.lm_head"
    return out | {"inputs_embeds": x, "final_hidden": hidden, "logits": _linear(w, head, hidden)}


def block_order(rows: int, columns: int) -> list[tuple[int, int]]:
    """(row, column) of the patches of an image: 2x2 blocks row by row, each from its top left to its bottom right."""
    corners = [(0, 0), (0, 1), (1, 0), (1, 1)]
    return [(r + i, c + j) for r in range(0, rows, 2) for c in range(0, columns, 2) for i, j in corners]


def _linear(w, name: str, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def _rms_norm(x, weight, eps: float):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def _vision_norm(vision, w, name: str, x):
    if vision.family == "aimv2":
        return _rms_norm(x, w[f"{name}.weight"], vision.norm_eps)
    x = x - x.mean(-1, keepdims=True)
    return _rms_norm(x, w[f"{name}.weight"], vision.norm_eps) + w[f"{name}.bias"]


def _flatten(canvas, side: int, mean, std):
    """[P, 3 p p], features channel by channel."""
    pixels = (canvas / 255 - mean) / std
    corners = block_order(canvas.shape[0] // side, canvas.shape[1] // side)
    pieces = [pixels[r * side : (r + 1) * side, c * side : (c + 1) * side] for r, c in corners]
    return np.stack([np.moveaxis(piece, 2, 0).reshape(-1) for piece in pieces])


def _embed(vision, w, patches, grid):
    if vision.family == "aimv2":
        root = "vision_encoder.preprocessor."
        kernel = w[root + "patchifier.proj.weight"]
        x = patches @ kernel.reshape(len(kernel), -1).T + w[root + "patchifier.proj.bias"]
        x = _rms_norm(x, w[root + "patchifier.norm.weight"], vision.norm_eps)
        table = None if vision.table_side is None else w[root + "pos_embed"][0]
    else:
        root = "vision_encoder.vision_model.embeddings."
        x = _linear(w, root + "proj", patches)
        table = None if vision.table_side is None else w[root + "pos_embed.weight"]
    return x if table is None else x + _positions(vision, table, *grid)


def _positions(vision, table, rows: int, columns: int):
    """The table of side n resized to rows x columns, then read in block order: [P, C]."""
    n = vision.table_side
    if vision.table_interpolation == "one_dim":
        flat = np.stack([_resized_linear(table, n * n, rows * columns, i) for i in range(rows * columns)])
        return np.stack([flat[r * columns + c] for r, c in block_order(rows, columns)])
    image = table.reshape(n, n, -1)
    tall = np.stack([_resized_cubic(image, n, rows, i) for i in range(rows)])
    wide = np.stack([_resized_cubic(tall.swapaxes(0, 1), n, columns, i) for i in range(columns)])
    return np.stack([wide[c, r] for r, c in block_order(rows, columns)])


def _resized_linear(values, n: int, size: int, i: int):
    source = max((i + 0.5) * n / size - 0.5, 0.0)
    low = int(source)
    return values[low] * (1 - source + low) + values[min(low + 1, n - 1)] * (source - low)


def _resized_cubic(values, n: int, size: int, i: int):
    """Entry i of `values` [n, ...] resized to `size`: Keys' cubic with a = -3/4, edges repeated."""
    source = (i + 0.5) * n / size - 0.5
    total = 0.0
    for tap in range(math.floor(source) - 1, math.floor(source) + 3):
        d, a = abs(source - tap), -0.75
        weight = 1 + d * d * ((a + 2) * d - (a + 3)) if d <= 1 else a * (d**3 - 5 * d * d + 8 * d - 4)
        total = total + weight * values[min(max(tap, 0), n - 1)]
    return total


def _rotate(x, angles):
    """x [T, H] turned by angles [T, H / 2]: dimension i with dimension i + H / 2, as one complex number."""
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def _attention(q, k, v, allowed):
    """One head: q, k, v [T, H], allowed bool [T, T]."""
    scores = np.where(allowed, q @ k.T / q.shape[-1] ** 0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def _encode(vision, w, x, grid):
    places = np.array(block_order(*grid))
    h = vision.hidden_size // vision.num_heads
    frequencies = vision.rope_theta ** -(np.arange(h // 4) / (h // 4))
    angles = np.concatenate([places[:, :1] * frequencies, places[:, 1:] * frequencies], -1)
    side = 2 * (vision.window_size // 2 // vision.patch_size)  # in patches
    window = places // max(side, 1)
    same_window = (window[:, None] == window[None]).all(-1)
    aimv2 = vision.family == "aimv2"
    for i in range(vision.num_layers):
        block = f"vision_encoder.trunk.blocks.{i}." if aimv2 else f"vision_encoder.vision_model.encoder.layers.{i}."
        y = _vision_norm(vision, w, block + ("norm_1" if aimv2 else "layer_norm1"), x)
        if aimv2:
            q, k, v = np.split(_linear(w, block + "attn.qkv", y), 3, axis=-1)
        else:
            q, k, v = (_linear(w, f"{block}self_attn.{name}_proj", y) for name in "qkv")
        full = vision.full_attention_layers is None or i in vision.full_attention_layers
        allowed = np.ones_like(same_window) if full else same_window
        heads = []
        for n in range(vision.num_heads):
            a, b, c = (part[:, n * h : (n + 1) * h] for part in (q, k, v))
            if vision.use_rope:
                a, b = _rotate(a, angles), _rotate(b, angles)
            heads.append(_attention(a, b, c, allowed))
        x = x + _linear(w, block + ("attn.proj" if aimv2 else "self_attn.out_proj"), np.concatenate(heads, -1))
        y = _vision_norm(vision, w, block + ("norm_2" if aimv2 else "layer_norm2"), x)
        hidden = ACTIVATIONS[vision.hidden_act](_linear(w, block + "mlp.fc1", y))
        x = x + _linear(w, block + "mlp.fc2", hidden * _linear(w, block + "mlp.fc3", y) if aimv2 else hidden)
    last = "vision_encoder.trunk.post_trunk_norm" if aimv2 else "vision_encoder.vision_model.post_layernorm"
    return _vision_norm(vision, w, last, x)


def _decode(text, w, x):
    t, h, group = len(x), text.head_dim, text.num_heads // text.num_kv_heads
    frequencies = float(text.rope_theta) ** -(np.arange(h // 2) / (h // 2))
    angles = np.arange(t)[:, None] * frequencies
    causal = np.tril(np.ones((t, t), bool))
    for i in range(text.num_layers):
        block = f"language_model.model.layers.{i}."

        def head(kind: str, n: int, y, block=block):
            """Head n of q, k or v: [T, H]."""
            return _linear(w, f"{block}self_attn.{kind}_proj", y)[:, n * h : (n + 1) * h]

        def turned(kind: str, n: int, y, block=block):
            x = head(kind, n, y)
            if text.qk_norm:
                x = _rms_norm(x, w[f"{block}self_attn.{kind}_norm.weight"], text.norm_eps)
            return _rotate(x, angles)

        y = _rms_norm(x, w[block + "input_layernorm.weight"], text.norm_eps)
        heads = [
            _attention(turned("q", n, y), turned("k", n // group, y), head("v", n // group, y), causal)
            for n in range(text.num_heads)
        ]
        x = x + _linear(w, block + "self_attn.o_proj", np.concatenate(heads, -1))
        y = _rms_norm(x, w[block + "post_attention_layernorm.weight"], text.norm_eps)
        gate = ACTIVATIONS["silu"](_linear(w, block + "mlp.gate_proj", y))
        x = x + _linear(w, block + "mlp.down_proj", gate * _linear(w, block + "mlp.up_proj", y))
    return _rms_norm(x, w["language_model.model.norm.weight"], text.norm_eps)
