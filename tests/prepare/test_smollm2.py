"""A language model out of a GGUF file: a small one made here against its own weights, the real one against `transformers`."""

import json
import pydoc_data.topics

import numpy as np
import pytest
from gguf import GGUFWriter

import andesvl_jax as avl
from andesvl_jax.checkpoints.hf import params_to_hf
from andesvl_jax.evaluation.perplexity import perplexity
from andesvl_jax.inputs.tokenizer import ADDED_TOKENS
from andesvl_jax.prepare.smollm2 import from_gguf, prepare_smollm2

D, F, LAYERS, HEADS, KV_HEADS, H = 24, 40, 2, 3, 1, 8
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # those that stand for themselves in a GPT-2 vocabulary
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
PREFIX = "language_model.model."


def vocabulary() -> tuple[list[str], list[str]]:
    shifted = [b for b in range(256) if b not in BYTES]
    letters = [chr(b if b in BYTES else 256 + shifted.index(b)) for b in range(256)]
    merges = ["t h", "th e", "Ġ the", "1 2"]
    return CONTROL + letters + [merge.replace(" ", "") for merge in merges], merges


def hf_tensors(rng, entries: int) -> dict[str, np.ndarray]:
    """Weights under the names of HF's Llama."""
    wide, narrow = HEADS * H, KV_HEADS * H
    shapes = {"self_attn.q_proj": (wide, D), "self_attn.k_proj": (narrow, D), "self_attn.v_proj": (narrow, D),
              "self_attn.o_proj": (D, wide), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
              "input_layernorm": (D,), "post_attention_layernorm": (D,)}  # fmt: skip
    tensors = {f"layers.{i}.{name}.weight": rng.normal(size=shape) for i in range(LAYERS) for name, shape in shapes.items()}
    tensors |= {"embed_tokens.weight": rng.normal(size=(entries, D)), "norm.weight": rng.normal(size=D)}
    return {PREFIX + name: x.astype(np.float32) for name, x in tensors.items()}


def interleaved(w: np.ndarray) -> np.ndarray:
    """Rows as llama.cpp's converter writes queries and keys: row j and j + H/2 of a head become neighbours."""
    order = [head * H + j + half * H // 2 for head in range(len(w) // H) for j in range(H // 2) for half in (0, 1)]
    return w[order]


def write(path, tensors, **changes) -> None:
    tokens, merges = vocabulary()
    writer = GGUFWriter(path, changes.pop("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.pop("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(merges)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for name, x in tensors.items():
        kind = name.removeprefix(PREFIX).removesuffix(".weight")
        if kind.startswith("layers."):
            _, layer, kind = kind.split(".", 2)
            to = f"blk.{layer}.{names[kind]}.weight"
        else:
            to = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[kind]
        if to not in changes.get("without", ()):
            writer.add_tensor(to, interleaved(x) if kind in ("self_attn.q_proj", "self_attn.k_proj") else x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tensors = hf_tensors(np.random.default_rng(0), len(vocabulary()[0]))
    write(path, tensors)
    return from_gguf(path), tensors


def test_every_weight_arrives_under_its_own_name(made):
    bundle, expected = made
    found = params_to_hf(bundle.params, bundle.config)
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name][: len(x)], x, name)
    new = found[PREFIX + "embed_tokens.weight"][len(vocabulary()[0]) :]
    np.testing.assert_array_equal(new, np.broadcast_to(expected[PREFIX + "embed_tokens.weight"].mean(0), new.shape))
    text = bundle.config.text
    assert (text.num_heads, text.num_kv_heads, text.head_dim, text.norm_eps) == (HEADS, KV_HEADS, H, 1e-5)
    assert not text.qk_norm and text.tie_word_embeddings and text.vocab_size == bundle.tokenizer.vocab_size


def test_the_tokenizer_is_the_files_with_the_added_tokens_behind(made):
    tokenizer, (tokens, _) = made[0].tokenizer, vocabulary()
    assert [tokens[i] for i in tokenizer.encode(" the 12")] == ["Ġthe", "Ġ", "1", "2"], "digits stand alone"
    assert tokenizer.im_end_id == 2 and tokenizer.image_token_id >= len(tokens)
    for name, _ in ADDED_TOKENS:
        assert len(tokenizer.encode(name, special=True)) == 1 and len(tokenizer.encode(name)) > 1
    assert tokenizer.encode("<repo_name>", special=True) == [3]


def test_it_is_saved_and_loaded_as_any_checkpoint(made, tmp_path):
    avl.save(made[0], tmp_path / "model")
    again = avl.load(tmp_path / "model", decode_only=True)
    ids = again.tokenizer.encode("the hat")
    np.testing.assert_array_equal(
        avl.generate(again, ids, max_new_tokens=4, stop_ids=()), avl.generate(made[0], ids, max_new_tokens=4, stop_ids=())
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "qwen3"}, "is no Llama with a tied head"),
        ({"pre": "llama-bpe"}, "has tokenizer gpt2/llama-bpe, expected gpt2/smollm"),
        ({"without": ("blk.1.ffn_up.weight",)}, "has no tensor blk.1.ffn_up.weight"),
    ],
)
def test_another_kind_of_file_is_refused(changes, message, tmp_path):
    write(tmp_path / "other.gguf", hf_tensors(np.random.default_rng(0), len(vocabulary()[0])), **changes)
    with pytest.raises(avl.UserError, match=message):
        from_gguf(tmp_path / "other.gguf")


def test_perplexity_is_e_to_the_mean_loss_of_the_windows(made):
    """Against log-softmax of the logits, window by window, in plain NumPy."""
    bundle = made[0]
    text, window = "the 12 hats of the cat " * 8, 32
    found = perplexity(bundle, [text], window=window)
    ids, losses = bundle.tokenizer.encode(text), []
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        scores = np.asarray(avl.probe(bundle, part)["logits"], np.float64)
        scores -= np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True)) + scores.max(-1, keepdims=True)
        losses += [-scores[i, part[i + 1]] for i in range(window - 1)]
    assert found["tokens"] == len(losses)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    with pytest.raises(avl.UserError, match="expected at least 64"):
        perplexity(bundle, ["the"], window=window)


@pytest.mark.slow
def test_the_real_model_continues_as_transformers_does(tmp_path):
    """20 prompts of 24 tokens, 64 greedy tokens each, on the same float32 weights."""
    pytest.importorskip("torch")
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    bundle = prepare_smollm2(tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())["text_config"]
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    peer = LlamaForCausalLM(LlamaConfig(**{key: raw[key] for key in keys}, rope_parameters=rope))
    tensors = {
        name.removeprefix("language_model."): x for name, x in load_file(tmp_path / "model" / "model.safetensors").items()
        if name.startswith("language_model.")
    }  # fmt: skip
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    peer.load_state_dict(tensors, strict=True)
    peer.generation_config.eos_token_id = None
    ids = bundle.tokenizer.encode("\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())))
    prompts = np.array(ids[: 20 * 24]).reshape(20, 24)
    with torch.inference_mode():
        expected = peer.eval().generate(torch.from_numpy(prompts), do_sample=False, max_new_tokens=64)[:, 24:].numpy()
    for prompt, continuation in zip(prompts, expected, strict=True):
        np.testing.assert_array_equal(avl.generate(bundle, prompt, max_new_tokens=64, stop_ids=()), continuation)
