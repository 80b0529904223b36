"""The same network in PyTorch: Qwen3 from `transformers`, the AIMv2 encoder and the projector from plain torch modules.

Both sides hold the same weights under the HF names, so their outputs can be compared before their speed is.
B batch rows, T tokens, P patches, M supervised tokens of a row, C vision width, D decoder width, N heads, H head width.
"""

from typing import Mapping

import numpy as np

from andesvl_jax.config import AndesVLConfig, TextConfig, VisionConfig
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.packing import Batch

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
    from transformers import Aimv2VisionConfig, Aimv2VisionModel, Cache, DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache
except ImportError as error:
    raise UserError(
        f"benchmarks compare with PyTorch ({error}): run `make bench`, or `pip install -e '.[peers]'` first."
    ) from error

DECODER = "language_model."  # prefix of the decoder's tensors among the HF names


def random_tensors(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights by HF name that keep activations in range: vectors near 1, matrices N(0, 1 / fan_in), tables N(0, 0.05^2).

    Numbers repeat with a prime period: drawing each of a billion would take longer than the benchmark.
    """
    pool = torch.randn(4_194_301, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors, at = {}, 0
    for name, shape in shapes.items():
        x = torch.empty(shape, dtype=dtype)
        flat = x.view(-1)
        for start in range(0, flat.numel(), len(pool)):
            stop = min(start + len(pool), flat.numel())
            first = min(len(pool) - at, stop - start)
            flat[start : start + first] = pool[at : at + first]
            flat[start + first : stop] = pool[: stop - start - first]
            at = (at + stop - start) % len(pool)
        is_table = "embed" in name or "lm_head" in name
        tensors[name] = x.mul_(0.1).add_(1) if x.ndim == 1 else x.mul_(0.05 if is_table else x[0].numel() ** -0.5)
    return tensors


def _as_torch(text: TextConfig, tensors: Mapping[str, np.ndarray | torch.Tensor]) -> dict[str, torch.Tensor]:
    """HF tensors with the tied head added; arrays that are views of this project's parameters are copied."""

    def convert(x: np.ndarray | torch.Tensor) -> torch.Tensor:
        return x if isinstance(x, torch.Tensor) else torch.from_numpy(x if x.flags.writeable else x.copy())

    ours = {name: convert(x) for name, x in tensors.items()}
    if text.tie_word_embeddings:
        ours[f"{DECODER}lm_head.weight"] = ours[f"{DECODER}model.embed_tokens.weight"]
    return ours


# ---- decoder


def build_decoder(text: TextConfig, tensors: Mapping[str, np.ndarray | torch.Tensor]) -> Qwen3ForCausalLM:
    """Qwen3 in evaluation mode, SDPA attention; `tensors` are HF tensors by name with the prefix `language_model.`, kept as they
    are, in their type."""
    config = Qwen3Config(
        vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_layers, num_attention_heads=text.num_heads, num_key_value_heads=text.num_kv_heads,
        head_dim=text.head_dim, rms_norm_eps=text.norm_eps, attention_bias=text.attention_bias,
        tie_word_embeddings=text.tie_word_embeddings, max_position_embeddings=text.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta}, attn_implementation="sdpa",
    )  # fmt: skip
    if not text.qk_norm:
        raise UserError("config field text.qk_norm: found False, expected True; the PyTorch side is Qwen3.")
    with torch.device("meta"):  # nothing to draw: every weight is assigned below
        model = Qwen3ForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # but for these frequencies, which are no weights
    ours = _as_torch(text, {name: x for name, x in tensors.items() if name.startswith(DECODER)})
    model.load_state_dict({name.removeprefix(DECODER): x for name, x in ours.items()}, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def prefill(model: Qwen3ForCausalLM, tokens: np.ndarray, slots: int | None = None) -> tuple[torch.Tensor, Cache]:
    """Prompt int32 [B, T] -> logits after its last token [B, V], cache: one that grows, or one of `slots` slots."""
    cache = DynamicCache(config=model.config) if slots is None else StaticCache(config=model.config, max_cache_len=slots)
    out = model(input_ids=torch.from_numpy(tokens).long(), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], cache


@torch.inference_mode()
def decode(step, last: torch.Tensor, cache: Cache, steps: int) -> tuple[list[int], torch.Tensor]:
    """Greedy decoding of one row for `steps` tokens: the tokens, and the logits [1, V] of the next one.

    step: the model, or its compiled forward (`torch.compile`), which wants a cache of fixed size.
    """
    tokens = []
    for _ in range(steps):
        token = last.argmax(-1, keepdim=True)
        tokens.append(int(token))
        last = step(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
    return tokens, last


# ---- encoder


def build_encoder(vision: VisionConfig, tensors: Mapping[str, torch.Tensor], pixels: int) -> Aimv2VisionModel:
    """`transformers`' AIMv2 for pictures of pixels x pixels, SDPA attention; `tensors` are HF tensors of this project's layout.

    Its position table belongs to one size: other sizes get this project's table, resized.
    """
    if vision.family != "aimv2":
        raise UserError(f"vision is {vision.family!r}, expected 'aimv2', the only encoder that the PyTorch side has.")
    config = Aimv2VisionConfig(
        hidden_size=vision.hidden_size, intermediate_size=vision.intermediate_size, num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads, image_size=pixels, patch_size=vision.patch_size, rms_norm_eps=vision.norm_eps,
        qkv_bias=vision.qkv_bias, mlp_bias=vision.use_bias, use_head=False, attn_implementation="sdpa",
    )  # fmt: skip
    get = {name.removeprefix("vision_encoder."): x for name, x in tensors.items()}
    root, side, n = "preprocessor.", vision.table_side, pixels // vision.patch_size
    table = get[root + "pos_embed"].view(1, side, side, -1).permute(0, 3, 1, 2)
    weights = {
        "embeddings.patch_embed.weight": get[root + "patchifier.proj.weight"],
        "embeddings.patch_embed.bias": get[root + "patchifier.proj.bias"],
        "embeddings.rms_norm.weight": get[root + "patchifier.norm.weight"],
        "embeddings.position_embedding.weight": F.interpolate(table, (n, n), mode="bicubic").flatten(2)[0].T.contiguous(),
        "rms_norm.weight": get["trunk.post_trunk_norm.weight"],
    }
    names = {"attn.proj": "attention.out_proj", "mlp.fc1": "ffn.gate_proj", "mlp.fc3": "ffn.up_proj", "mlp.fc2": "ffn.down_proj"}
    names |= {"norm_1": "rms_norm1", "norm_2": "rms_norm2"}
    for i in range(vision.num_layers):
        ours, theirs = f"trunk.blocks.{i}.", f"encoder.layers.{i}."
        for here, there in names.items():
            weights[f"{theirs}{there}.weight"] = get[f"{ours}{here}.weight"]
        for part, x in zip("qkv", get[f"{ours}attn.qkv.weight"].chunk(3), strict=True):
            weights[f"{theirs}attention.{part}_proj.weight"] = x
    model = Aimv2VisionModel(config)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


@torch.inference_mode()
def encode(model: Aimv2VisionModel, pictures: np.ndarray) -> torch.Tensor:
    """float32 [B, 3, H, W] -> [B, P, C], patches in raster order."""
    return model(torch.from_numpy(pictures)).last_hidden_state


class Block(nn.Module):
    """AIMv2 layer; the attributes carry the HF names."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        c, f = vision.hidden_size, vision.intermediate_size
        self.heads = vision.num_heads
        self.norm_1 = nn.RMSNorm(c, vision.norm_eps)
        self.norm_2 = nn.RMSNorm(c, vision.norm_eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(c, 3 * c, vision.qkv_bias), "proj": nn.Linear(c, c, vision.use_bias)})
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(c, f, vision.use_bias),
                "fc3": nn.Linear(c, f, vision.use_bias),
                "fc2": nn.Linear(f, c, vision.use_bias),
            }
        )

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [B, P, C]; cos, sin [B, 1, P, H]; mask bool [B, 1, P, P]."""
        b, p, c = x.shape
        q, k, v = self.attn["qkv"](self.norm_1(x)).view(b, p, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, attn_mask=mask)
        x = x + self.attn["proj"](y.transpose(1, 2).reshape(b, p, c))
        y = self.norm_2(x)
        return x + self.mlp["fc2"](F.silu(self.mlp["fc1"](y)) * self.mlp["fc3"](y))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Encoder(nn.Module):
    """AIMv2 with 2-D RoPE and a learned table that is resized to the grid of each picture."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        if vision.family != "aimv2" or vision.table_interpolation != "two_dim" or vision.table_side is None:
            raise UserError(
                f"vision is {vision.family!r} with {vision.table_interpolation!r} table interpolation; the PyTorch side of "
                "train_step is AIMv2 with a learned two_dim table, expected a configuration such as nano or andesvl-1b."
            )
        c, side = vision.hidden_size, vision.patch_size
        self.vision = vision
        patchifier = nn.ModuleDict(
            {"proj": nn.Conv2d(vision.num_channels, c, side, stride=side), "norm": nn.RMSNorm(c, vision.norm_eps)}
        )
        self.preprocessor = nn.ModuleDict({"patchifier": patchifier})
        self.preprocessor.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, vision.table_side**2, c)))
        blocks = nn.ModuleList(Block(vision) for _ in range(vision.num_layers))
        self.trunk = nn.ModuleDict({"blocks": blocks, "post_trunk_norm": nn.RMSNorm(c, vision.norm_eps)})

    def forward(self, images: "TorchImages") -> torch.Tensor:
        """-> [B, P, C] in 2x2 block order."""
        patchifier = self.preprocessor["patchifier"]
        projection = patchifier["proj"]
        x = patchifier["norm"](F.linear(images.patches, projection.weight.flatten(1), projection.bias))
        x = x + self.table(images.sizes)[images.table_index]
        for block in self.trunk["blocks"]:
            x = block(x, images.cos, images.sin, images.mask)
        return self.trunk["post_trunk_norm"](x)

    def table(self, sizes: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """The position table at every grid size, raster order, one behind the other: [sum of rows x columns, C]."""
        side = self.vision.table_side
        table = self.preprocessor.pos_embed.view(1, side, side, -1).permute(0, 3, 1, 2)
        resized = [F.interpolate(table, size, mode="bicubic", align_corners=False).flatten(2)[0].T for size in sizes]
        return torch.cat(resized)


class TorchImages:
    """What the encoder needs of a batch's pictures, prepared once on the host as this project's batches are."""

    def __init__(self, vision: VisionConfig, batch: Batch):
        images = batch.images
        self.patches = torch.from_numpy(images.patches)
        self.sizes = tuple(sorted({(int(r), int(c)) for r, c in images.grids.reshape(-1, 2)}))
        starts = np.cumsum([0, *(r * c for r, c in self.sizes)])
        start = dict(zip(self.sizes, starts, strict=False))
        first = np.array([[start[int(r), int(c)] for r, c in grids] for grids in images.grids])
        within = images.coordinates[..., 0] * images.grids[..., 1] + images.coordinates[..., 1]
        self.table_index = torch.from_numpy(first + within).long()
        width = vision.head_dim // 2
        frequencies = vision.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = (torch.from_numpy(images.coordinates)[..., None].float() * frequencies).flatten(2)
        angles = torch.cat([angles, angles], -1)[:, None]
        self.cos, self.sin = angles.cos(), angles.sin()
        self.mask = _same_segment(images.segments)


def _same_segment(segments: np.ndarray) -> torch.Tensor:
    """bool [B, 1, S, S] of int32 [B, S]; padding sees padding, so that no softmax is over nothing."""
    segments = torch.from_numpy(segments)
    return (segments[:, :, None] == segments[:, None, :])[:, None]


# ---- the whole network and its loss


class TorchBatch:
    """A packed batch as tensors: 4-D block-diagonal causal mask, positions that restart, and the supervised slots."""

    def __init__(self, config: AndesVLConfig, batch: Batch):
        self.images = TorchImages(config.vision, batch)
        self.tokens = torch.from_numpy(batch.tokens).long()
        self.positions = torch.from_numpy(np.maximum(batch.positions, 0)).long()
        t = batch.tokens.shape[1]
        self.mask = _same_segment(batch.segments) & torch.ones(t, t, dtype=torch.bool).tril()
        self.is_visual = torch.from_numpy(batch.visual_index >= 0)
        self.visual_row, self.visual_slot = _indices(self.is_visual, batch.visual_index)
        supervised = torch.from_numpy(batch.target_slots >= 0)
        self.target_row, self.target_slot = _indices(supervised, batch.target_slots)
        self.targets = torch.from_numpy(batch.targets)[supervised].long()


def _indices(chosen: torch.Tensor, slots: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Row number and slot of each chosen entry of int32 [B, ...], in row-major order."""
    return chosen.nonzero()[:, 0], torch.from_numpy(slots)[chosen].long()


class Network(nn.Module):
    """Encoder, projector, decoder; `forward` is the mean cross-entropy over supervised tokens."""

    def __init__(self, config: AndesVLConfig, tensors: Mapping[str, np.ndarray]):
        super().__init__()
        wide, d = 4 * config.vision.hidden_size, config.text.hidden_size
        self.vision_encoder = Encoder(config.vision)
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, d))
        self.language_model = build_decoder(config.text, tensors)
        self.load_state_dict(_as_torch(config.text, tensors), strict=True)

    def forward(self, batch: TorchBatch) -> torch.Tensor:
        visual = self.vision_encoder(batch.images)
        visual = self.mlp(visual.reshape(visual.shape[0], visual.shape[1] // 4, -1))
        x = self.language_model.model.embed_tokens(batch.tokens)
        x = x.masked_scatter(batch.is_visual[..., None], visual[batch.visual_row, batch.visual_slot])
        hidden = self.language_model.model(
            inputs_embeds=x, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        logits = self.language_model.lm_head(hidden[batch.target_row, batch.target_slot])
        return F.cross_entropy(logits, batch.targets)


class Trainer:
    """AdamW (fused) with clipping; matrices and tables decay, norms and biases do not. `compiled`: through `torch.compile`."""

    def __init__(
        self, network: Network, b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float, compiled: bool = False
    ):
        self.network, self.clip_norm = network.train(), clip_norm
        self.loss = torch.compile(network) if compiled else network
        parameters = list(network.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(b1, b2), eps=eps, fused=True)

    def step(self, batch: TorchBatch, rate: float) -> float:
        """One update at learning rate `rate`; the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        self.optimizer.step()
        return float(loss.detach())
