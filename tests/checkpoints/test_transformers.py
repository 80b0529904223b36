"""What this project writes, read by the safetensors library and computed by the models of `transformers`, part by part."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from directories import CONFIGS as TINY
from directories import bundle_of
from tiny import tiny_config

import andesvl_jax as avl
from andesvl_jax.config import CONFIGS, AndesVLConfig
from andesvl_jax.decoding.state import prefill
from andesvl_jax.inputs.image import patchify
from andesvl_jax.model.vision import embed_patches, encode

INSTALLED = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None
pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs the extra `peers`: torch and transformers")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def without_rope(config: AndesVLConfig) -> AndesVLConfig:
    """`transformers` has both encoders, but with a learned position table only."""
    return config.replace(vision=dataclasses.replace(config.vision, use_rope=False))


def tiny_directory(directory: Path, family: str, **changes) -> Path:
    avl.save(bundle_of(without_rope(tiny_config(family, **changes))), directory / "model", max_shard_bytes=9000)
    return directory / "model"


@pytest.fixture(scope="module")
def full_directory(tmp_path_factory):
    """A checkpoint of random weights in bfloat16, which both sides read as float32: name -> directory."""

    def make(name: str) -> Path:
        directory = tmp_path_factory.getbasetemp() / name
        if not directory.exists():
            directory.mkdir()
            spec = importlib.util.spec_from_file_location("full_size", BENCHMARKS / "full_size.py")
            full_size = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(full_size)
            config = without_rope(CONFIGS[name]).replace(param_dtype="bfloat16")
            if name == "andesvl-1b":  # its decoder is the one of andesvl-0.6b
                config = config.replace(text=TINY["aimv2"].text)
            full_size.write_random(directory, config)
        return directory

    return make


def tensors_of(directory: Path, prefix: str):
    """The tensors of one part in float32, without its prefix, as the safetensors library reads them."""
    from safetensors.torch import load_file

    found = {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}
    return {name.removeprefix(prefix): x.float() for name, x in found.items() if name.startswith(prefix)}


def qwen3(directory: Path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    raw = json.loads((directory / "config.json").read_text())["text_config"]
    model = Qwen3ForCausalLM(Qwen3Config(**raw, attn_implementation="eager"))
    assert model.config.rope_parameters["rope_theta"] == raw["rope_theta"]
    tensors = tensors_of(directory, "language_model.")
    if raw["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model.eval()


def check_text(directory: Path, vocabulary: int, length: int, absolute: float) -> None:
    """Logits at the end of a prompt within `absolute`, and 16 greedy ids exactly."""
    import torch

    ids = np.random.default_rng(0).integers(0, min(vocabulary, 151643), length)
    model = qwen3(directory)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()
        greedy = model.generate(torch.from_numpy(ids)[None], do_sample=False, max_new_tokens=16)[0, length:].numpy()
    del model
    bundle = avl.load(directory)
    tokens, positions = ids[None].astype(np.int32), np.arange(length, dtype=np.int32)[None]
    last = prefill(bundle.decoding_params, bundle.decoding_config, tokens, positions, None, jnp.full_like(tokens, -1)).last
    assert np.abs(expected).max() > 0.5
    assert np.abs(np.asarray(last[0]) - expected).max() < absolute
    np.testing.assert_array_equal(avl.generate(bundle, ids, max_new_tokens=16, stop_ids=()), greedy)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": True}])
def test_qwen3_computes_the_same(changes, tmp_path):
    # float32 on both sides; the orders of summation differ
    check_text(tiny_directory(tmp_path, "aimv2", text=changes), 60, 12, absolute=1e-5)


@pytest.mark.slow
def test_qwen3_of_full_size_computes_the_same(full_directory):
    check_text(full_directory("andesvl-0.6b"), 151936, 64, absolute=1e-4)


def aimv2(directory: Path):
    """`Aimv2VisionModel` with the encoder of a directory; `transformers` splits q, k, v and names things differently."""
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    raw = json.loads((directory / "config.json").read_text())["vision_config"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    config = Aimv2VisionConfig(
        **{name: raw[name] for name in (*names, "qkv_bias", "rms_norm_eps", "hidden_act")},
        mlp_bias=raw["use_bias"],
        use_head=False,
    )
    renamed = {
        r"preprocessor\.patchifier\.proj": "embeddings.patch_embed", r"preprocessor\.patchifier\.norm": "embeddings.rms_norm",
        r"preprocessor\.pos_embed": "embeddings.position_embedding.weight", r"trunk\.post_trunk_norm": "rms_norm",
        r"trunk\.blocks\.": "encoder.layers.", r"norm_(\d)": r"rms_norm\1", r"attn\.proj": "attention.out_proj",
        r"mlp\.fc1": "ffn.gate_proj", r"mlp\.fc3": "ffn.up_proj", r"mlp\.fc2": "ffn.down_proj",
    }  # fmt: skip
    tensors = {}
    for name, x in tensors_of(directory, "vision_encoder.").items():
        for old, new in renamed.items():
            name = re.sub(old, new, name)
        if "attn.qkv" in name:
            for part, y in zip("qkv", x.chunk(3), strict=True):
                tensors[name.replace("attn.qkv", f"attention.{part}_proj")] = y
        else:
            tensors[name] = x[0] if "position_embedding" in name else x
    model = Aimv2VisionModel(config)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def siglip2(directory: Path):
    """`SiglipVisionModel` with the encoder of a directory; its patch embedding is a convolution."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    raw = json.loads((directory / "config.json").read_text())["vision_config"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "layer_norm_eps")
    side = round(raw["num_patches"] ** 0.5) * raw["patch_size"]
    config = SiglipVisionConfig(**{name: raw[name] for name in (*names, "hidden_act")}, image_size=side, vision_use_head=False)
    tensors = {}
    for name, x in tensors_of(directory, "vision_encoder.vision_model.").items():
        name = name.replace("embeddings.proj.", "embeddings.patch_embedding.").replace("pos_embed.", "position_embedding.")
        patch = raw["patch_size"]
        tensors[name] = x.view(-1, 3, patch, patch) if name == "embeddings.patch_embedding.weight" else x
    model = SiglipVisionModel(config)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def check_vision(directory: Path, build, relative: float) -> None:
    """The encoder's output for a picture of the table's own size, max|difference| / max|expected| within `relative`."""
    import torch

    bundle = avl.load(directory)
    vision, processor = bundle.config.vision, bundle.image_processor
    assert not vision.use_rope
    side = vision.table_side * vision.patch_size
    canvas = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    pixels = (canvas.astype(np.float32) / 255 - np.float32(processor.mean)) / np.float32(processor.std)
    model = build(directory)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]).last_hidden_state[0].numpy()
    del model

    patches, coordinates, grid = patchify(canvas, processor)
    grids = np.broadcast_to(np.int32(grid), coordinates.shape)[None]

    @jax.jit
    def output(params, patches, coordinates):
        x = embed_patches(params, bundle.config, patches, coordinates, grids)
        return encode(params, bundle.config, x, coordinates, jnp.zeros(coordinates.shape[:2], jnp.int32))

    found = np.asarray(output(bundle.params.vision, patches[None], coordinates[None])[0])
    raster = coordinates[:, 0] * grid[1] + coordinates[:, 1]
    assert np.abs(expected).max() > 0.5
    assert np.abs(found - expected[raster]).max() / np.abs(expected).max() < relative


ENCODERS = {"aimv2": aimv2, "siglip2": siglip2}


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_compute_the_same(family, tmp_path):
    # float32 on both sides; every other mistake tried shows up at 1e-3 or more, another GELU at 1.3e-4
    directory = tiny_directory(tmp_path, family, vision={"table_side": 6})
    check_vision(directory, ENCODERS[family], relative=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), [("andesvl-1b", "aimv2"), ("andesvl-0.6b", "siglip2")])
def test_encoders_of_full_size_compute_the_same(name, family, full_directory):
    check_vision(full_directory(name), ENCODERS[family], relative=3e-5)
