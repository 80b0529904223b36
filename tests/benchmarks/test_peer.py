"""The benchmarks: their arithmetic, what they say without PyTorch, and (where it is installed) that both sides agree."""

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import max_relative, random_sample, tiny_batch, tiny_config, tiny_params

from andesvl_jax.checkpoints.hf import params_to_hf
from andesvl_jax.config import CONFIGS
from andesvl_jax.errors import UserError
from andesvl_jax.model.andesvl import describe
from andesvl_jax.training.step import loss_sums
from andesvl_jax.weights import count

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
INSTALLED = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None
needs_peer = pytest.mark.skipif(not INSTALLED, reason="needs the extra `peers`: torch and transformers")


@pytest.fixture
def module(monkeypatch):
    """Imports a file of benchmarks/ as those files import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_sides_are_timed_in_turns_and_medians_kept(module, monkeypatch):
    timing = module("timing")
    monkeypatch.setattr(timing, "REST_S", 0.0)
    order: list[str] = []
    times = iter([3.0, 30.0, 1.0, 10.0, 2.0, 20.0])

    def side(name: str) -> float:
        order.append(name)
        return next(times)

    assert timing.in_turns(lambda: side("a"), lambda: side("b"), runs=3) == (2.0, 20.0)
    assert order == ["a", "b"] * 3


def test_number_of_threads_is_the_faster_one(module, monkeypatch):
    timing = module("timing")
    monkeypatch.setattr(timing, "cores", lambda: 4)
    current = 0
    spent = {1: 0.2, 4: 0.1}

    def set_threads(threads: int) -> None:
        nonlocal current
        current = threads

    monkeypatch.setattr(timing, "seconds", lambda fn: spent[current])
    assert timing.fastest_threads(set_threads, lambda: None) == 4 == current
    spent[4] = 0.3
    assert timing.fastest_threads(set_threads, lambda: None) == 1 == current


def test_a_busy_machine_is_reported(module, monkeypatch, capsys):
    timing = module("timing")
    monkeypatch.setattr(timing, "share_of_cores", lambda: 1.0)
    assert timing.quiet_row(share_before=0.4)["value"] == 0.4
    assert "40%" in capsys.readouterr().err
    timing.quiet_row(share_before=0.95)
    assert capsys.readouterr().err == ""


def test_read_bandwidth_and_share_are_plausible(module):
    timing = module("timing")
    assert 1e8 < timing.read_bandwidth(gibibytes=1 / 64, runs=1) < 1e13
    assert 0 < timing.share_of_cores(0.05) < 1.2


def test_table_shows_every_row(module):
    timing = module("timing")
    rows = [
        timing.row("speed", 12.5, "tokens/s", 10.0, 1.25),
        timing.row("difference", 1.2e-6, "nats"),
        timing.row("tokens", 2048, "tokens"),
    ]
    text = timing.table({"name": "decode pico", "rows": rows})
    assert re.search(r"speed +12\.5 +10\.0 tokens/s +1\.25", text)
    assert re.search(r"difference +1\.20e-06 +nats", text)
    assert re.search(r"tokens +2,048 +tokens", text)


def test_unknown_configuration_is_a_sentence(module):
    with pytest.raises(UserError, match="'mega'.*nano"):
        module("timing").config_by_name("mega")


def test_missing_torch_is_a_sentence(module, monkeypatch):
    monkeypatch.delitem(sys.modules, "peer", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="make bench"):
        module("peer")
    with pytest.raises(UserError, match="make bench"):
        module("decode").run("pico", quick=True)


def test_packed_batch_has_full_rows(module):
    train_step = module("train_step")
    batch = train_step.packed_batch(CONFIGS["pico"], rows=2)
    assert batch.tokens.shape == (2, 224)
    assert (batch.visual_index >= 0).sum(axis=1).tolist() == [36, 36]  # (8*8 + 8*10) / 4
    assert (batch.target_slots >= 0).sum(axis=1).tolist() == [60, 60]
    assert (batch.images.segments >= 0).sum(axis=1).tolist() == [144, 144]


def test_bytes_per_token_counts_weights_and_cache(module):
    decode = module("decode")
    for tied in (True, False):
        config = tiny_config(text={"tie_word_embeddings": tied})
        params = tiny_params(config)
        weights = sum(x.size for x in jax.tree.leaves(params.decoder)) - (0 if tied else 64 * 24)
        assert decode._bytes_per_token(params, config, 10) == 4 * (weights + 2 * 2 * 2 * 8 * 10)


@pytest.mark.slow
def test_a_random_checkpoint_is_written_loaded_and_questioned(module, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    rows = {row["what"]: row["value"] for row in module("full_size").run("pico", quick=True)["rows"]}
    assert rows["parameters in memory"] * 2**30 == 2 * count(describe(CONFIGS["pico"]))
    assert rows["visual tokens of the picture"] == 25 and rows["prefill of 89 tokens"] > 0 and rows["decode"] > 0
    assert rows["peak memory before loading"] <= rows["peak memory of loading"] <= rows["peak memory of decoding"]
    assert not any(tmp_path.iterdir())


def test_a_disk_without_room_is_a_sentence(module, monkeypatch):
    full_size = module("full_size")
    monkeypatch.setattr(full_size.shutil, "disk_usage", lambda _: SimpleNamespace(free=5e9))
    monkeypatch.setattr(full_size.timing, "share_of_cores", lambda: 1.0)
    with pytest.raises(UserError, match=r"5\.0 GB free, expected 9\.2; set TMPDIR"):
        full_size.run("andesvl-4b")


@needs_peer
@pytest.mark.parametrize("tied", [True, False])
def test_both_sides_compute_the_same_loss_and_gradient(module, tied):
    peer = module("peer")
    config = tiny_config(text={"tie_word_embeddings": tied})
    params = tiny_params(config)
    rng = np.random.default_rng(0)
    rows = [[random_sample(config, rng), random_sample(config, rng, ((4, 2), (4, 4)))], [random_sample(config, rng, ())]]
    batch = tiny_batch(config, rows)
    network = peer.Network(config, params_to_hf(params, config))
    loss = network(peer.TorchBatch(config, batch))
    loss.backward()

    def mean(params):
        total, weight, _ = loss_sums(params, config, batch)
        return total / weight

    expected, gradient = jax.value_and_grad(mean)(params)
    assert abs(loss.item() - float(expected)) < 1e-5
    gradients = params_to_hf(gradient, config)
    found = {name: p.grad.numpy() for name, p in network.named_parameters()}
    assert set(found) == set(gradients)
    assert max(max_relative(found[name], gradients[name]) for name in found) < 1e-4


@needs_peer
def test_both_sides_decode_the_same(module):
    peer = module("peer")
    from andesvl_jax.decoding.state import prefill

    config = tiny_config()
    params = tiny_params(config)
    tokens = np.arange(1, 9, dtype=np.int32)[None]
    model = peer.build_decoder(config.text, params_to_hf(params, config))
    last, cache = peer.prefill(model, tokens)
    state = prefill(params, config, tokens, np.arange(8)[None], None, jnp.full_like(tokens, -1))
    assert max_relative(last.numpy(), state.last) < 1e-5
    made, _ = peer.decode(model, last, cache, 3)
    assert len(made) == 3 and cache.get_seq_length() == 11


@needs_peer
def test_siglip2_is_refused(module):
    peer = module("peer")
    config = tiny_config("siglip2")
    with pytest.raises(UserError, match="AIMv2"):
        peer.Network(config, params_to_hf(tiny_params(config), config))
