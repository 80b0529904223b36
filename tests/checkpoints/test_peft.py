"""Adapters as PEFT directories: round trips, `peft` itself as the other side, and directories that do not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import max_relative, random_sample, tiny_batch, tiny_config, tiny_params

from andesvl_jax.checkpoints.peft import SETTINGS, TENSORS, base_hash, load_adapter, save_adapter
from andesvl_jax.errors import UserError
from andesvl_jax.model.andesvl import forward
from andesvl_jax.model.decoder import logits
from andesvl_jax.weights import DECODER_MATRICES, Adapt, Int8, LoRA, Quantize, Rule, is_leaf, represent

FAMILIES = {name: tiny_config(name, text={"tie_word_embeddings": False}) for name in ("aimv2", "siglip2")}
CONFIG = FAMILIES["aimv2"]
TWO_RANKS = [
    Rule(r"decoder\.layers\.(q|v)", Adapt(2, 4.0)),
    Rule(r"decoder\.layers\.(k|o|gate|up|down)", Adapt(3, 5.0, rank_stabilized=True)),
    Rule(r"vision\.layers\.(qkv|proj|fc1|fc2|fc3)|projector\.(fc1|fc2)", Adapt(2, 1.0)),
]


def adapted(config, rules=TWO_RANKS, seed: int = 0):
    """Adapters that do something."""
    params = represent(tiny_params(config), rules, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def filled(w):
        return w.replace(b=jnp.asarray(0.3 * rng.normal(size=w.b.shape), jnp.float32)) if isinstance(w, LoRA) else w

    return jax.tree.map(filled, params, is_leaf=is_leaf)


def scores(params, config):
    rng = np.random.default_rng(0)
    batch = tiny_batch(config, [[random_sample(config, rng)]], tokens=32, patches=24)
    run = jax.jit(lambda params: logits(params.decoder, forward(params, config, batch)) * (batch.positions >= 0)[..., None])
    return run(params)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_back(family, tmp_path):
    config = FAMILIES[family]
    params = adapted(config)
    save_adapter(params, config, tmp_path / "a", "base")
    found = load_adapter(tiny_params(config), config, tmp_path / "a")
    # adapters of SigLIP2's q, k and v come back as one of three times the rank: float32 in another order
    assert max_relative(scores(found, config), scores(params, config)) <= 2e-6
    assert max_relative(scores(found, config), scores(tiny_params(config), config)) > 1e-2
    if family == "aimv2":
        for a, b in zip(jax.tree.leaves(found.decoder.layers.q), jax.tree.leaves(params.decoder.layers.q), strict=True):
            np.testing.assert_array_equal(a, b)
    save_adapter(found, config, tmp_path / "again", "base")
    again = load_adapter(tiny_params(config), config, tmp_path / "again")
    assert max_relative(scores(again, config), scores(params, config)) <= 2e-6


def test_an_adapter_goes_over_packed_weights_of_its_base_alone(tmp_path):
    packed = represent(tiny_params(CONFIG), [Rule(DECODER_MATRICES, Quantize(Int8()))])
    params = represent(packed, [Rule(DECODER_MATRICES, Adapt(2, 4.0))], jax.random.key(0))
    save_adapter(params, CONFIG, tmp_path / "a", "packed base")
    assert base_hash(params) == base_hash(packed) != base_hash(tiny_params(CONFIG))
    found = load_adapter(packed, CONFIG, tmp_path / "a")
    assert jax.tree.structure(found) == jax.tree.structure(params)
    with pytest.raises(UserError, match="an adapter for the base [0-9a-f]{12}, found a model with hash"):
        load_adapter(tiny_params(CONFIG), CONFIG, tmp_path / "a")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params(CONFIG))
    assert base_hash(half) == base_hash(tiny_params(CONFIG))  # in whatever type a checkpoint is loaded


@pytest.fixture
def directory(tmp_path):
    params = adapted(CONFIG, [Rule(r"decoder\.layers\.(q|v)", Adapt(2, 4.0))])
    save_adapter(params, CONFIG, tmp_path / "a", "base")
    return tmp_path / "a"


Q0 = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "the rank of .* is 0, expected a whole number from 1"),
        ({"r": 2.5}, "is 2.5, expected a whole number"),
        ({"r": 3}, r"lora_A \[2, 24\] and lora_B \[32, 2\], expected \[3, 24\] and \[32, 3\]"),
        ({"lora_alpha": None}, "lora_alpha of .* is None, expected a number"),
        ({"rank_pattern": {"(": 2}}, "not a map from module patterns"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message, directory):
    settings = json.loads((directory / SETTINGS).read_text()) | change
    (directory / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        load_adapter(tiny_params(CONFIG), CONFIG, directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q0}A.weight"), "has lora_B alone, expected both halves"),
        (lambda t: t.update({f"{Q0}B.weight": np.full((32, 2), np.nan, np.float32)}), "q_proj holds numbers that are not finite"),
        (lambda t: t.update({f"{Q0}A.weight": np.ones((2, 24), np.int32)}), "has type I32 and F32"),
        (lambda t: t.update({"base_model.model.layers.0.query.lora_A.weight": np.ones((2, 24), np.float32)}), "modules such as"),
        (lambda t: t.update({"lm_head.weight": np.ones((2, 24), np.float32)}), "unknown tensor 'lm_head.weight'"),
        (lambda t: t.clear(), "holds no adapter"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, directory):
    tensors = load_file(directory / TENSORS)
    change(tensors)
    save_file(tensors, directory / TENSORS)
    with pytest.raises(UserError, match=message):
        load_adapter(tiny_params(CONFIG), CONFIG, directory)


def test_what_is_no_adapter_is_refused(directory, tmp_path):
    params = tiny_params(CONFIG)
    with pytest.raises(UserError, match="has no adapter_config.json"):
        load_adapter(params, CONFIG, tmp_path)
    with pytest.raises(UserError, match="has no adapter to save"):
        save_adapter(params, CONFIG, tmp_path / "b", "base")
    with pytest.raises(UserError, match="has an adapter already"):
        load_adapter(load_adapter(params, CONFIG, directory), CONFIG, directory)
    with pytest.raises(UserError, match="has no place in the PEFT layout"):
        table = represent(params, [Rule(r"decoder\.embedding", Adapt(2, 1.0))], jax.random.key(0))
        save_adapter(table, CONFIG, tmp_path / "b", "base")
    (directory / TENSORS).rename(directory / "adapter_model.bin")
    with pytest.raises(UserError, match="a pickle"):
        load_adapter(params, CONFIG, directory)


def decoder_of(torch, transformers):
    """The decoder of CONFIG in `transformers`, with its weights."""
    from andesvl_jax.checkpoints.hf import params_to_hf

    text = CONFIG.text
    config = transformers.Qwen3Config(
        vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_layers, num_attention_heads=text.num_heads, num_key_value_heads=text.num_kv_heads,
        head_dim=text.head_dim, rope_theta=text.rope_theta, tie_word_embeddings=False, rms_norm_eps=text.norm_eps,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval()
    weights = params_to_hf(tiny_params(CONFIG), CONFIG)
    of_decoder = {name.removeprefix("language_model."): x for name, x in weights.items() if name.startswith("language_model.")}
    state = {name: torch.from_numpy(x.copy()) for name, x in of_decoder.items()}
    model.load_state_dict(state)
    return model


def text_scores(params):
    rng = np.random.default_rng(0)
    sample = random_sample(CONFIG, rng, (), text=12)
    batch = tiny_batch(CONFIG, [[sample]], tokens=12, patches=0)
    run = jax.jit(lambda params: logits(params.decoder, forward(params, CONFIG, batch)))
    return sample.tokens, run(params)[0]


def test_peft_reads_what_is_written(tmp_path):
    peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
    params = adapted(CONFIG, TWO_RANKS[:2])
    save_adapter(params, CONFIG, tmp_path / "a", "base")
    whole = transformers.Qwen3ForCausalLM(decoder_of(torch, transformers).config)  # stands in for the class of the release
    whole.language_model = decoder_of(torch, transformers)
    whole.forward = whole.language_model.forward
    theirs = peft.PeftModel.from_pretrained(whole, tmp_path / "a").eval()
    assert sum(bool(getattr(m, "lora_A", None)) for m in whole.language_model.modules()) == 14
    tokens, expected = text_scores(params)
    with torch.no_grad():
        found = theirs(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()
    assert max_relative(found, expected) <= 1e-4  # float32, another framework


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_writes_is_read(rslora, tmp_path):
    peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=rslora, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
        rank_pattern={"down_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 3},
    )  # fmt: skip
    theirs = peft.get_peft_model(decoder_of(torch, transformers), config).eval()
    for name, value in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    theirs.save_pretrained(tmp_path / "a")
    tokens, found = text_scores(load_adapter(tiny_params(CONFIG), CONFIG, tmp_path / "a"))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()
    assert max_relative(found, expected) <= 1e-4  # float32, another framework
    assert max_relative(found, text_scores(tiny_params(CONFIG))[1]) > 1e-2
