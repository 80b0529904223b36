"""Sharding: every mesh trains as one device does and says no more than it must; what does not fit is refused by name."""

import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from tiny import tiny_config, xla_flags

import andesvl_jax as avl
from andesvl_jax.config import CONFIGS
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.model.andesvl import describe
from andesvl_jax.model.attention import Part, Place, attend
from andesvl_jax.training.collectives import by_kind, collectives
from andesvl_jax.training.sharding import (
    MESH_AXES,
    ShardingRules,
    check_budget,
    make_mesh,
    param_shardings,
    rules_for,
    sharding_table,
)
from andesvl_jax.weights import Param, is_param

ALL_AXES = "data=2,fsdp=-1,tensor=2"
IN_PARTS = "fsdp=2,context=2,tensor=2"  # rows, too
SLOW = ("data=8", "fsdp=8", "fsdp=4,tensor=2", "data=4,context=2", "data=2,fsdp=2,context=2", "context=8")
MESHES = [ALL_AXES, IN_PARTS, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in SLOW)]
CONFIG, TOKENS, PATCHES, TARGETS = tiny_config(vision={"num_layers": 1}), 48, 64, 24  # as in eight_devices.py


def mesh_of(data=1, fsdp=1, context=1, tensor=1) -> AbstractMesh:
    return AbstractMesh((data, fsdp, context, tensor), MESH_AXES)


@functools.cache
def run_on(mesh: str) -> dict:
    """What eight_devices.py finds on a mesh, or without one ("none")."""
    return run_script("eight_devices.py", 8, mesh)[mesh]


def run_script(name: str, devices: int, *meshes: str) -> dict:
    script = Path(__file__).with_name(name)
    flags = {"XLA_FLAGS": xla_flags(devices), "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run([sys.executable, script, *meshes], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_has_the_losses_of_one_device(mesh):
    np.testing.assert_allclose(run_on(mesh)["losses"], run_on("none")["losses"], atol=1e-5, rtol=0)  # float32, other sums
    assert run_on(mesh)["state_stays_in_place"]
    assert run_on("none")["summed"] == 0 and run_on("none")["moved"] == {}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_gathers_each_weight_once_and_nothing_else_but_what_parts_of_a_row_must_see(mesh):
    """Exact, so that an activation or a moment that starts to travel fails here."""
    size = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | {a: int(n) for a, n in re.findall(r"(\w+)=(\d+)", mesh)}
    if mesh == ALL_AXES:
        size["fsdp"] = 2
    rows, parts, tensor = 8 // size["data"] // size["fsdp"], size["context"], size["tensor"]
    vision, text = CONFIG.vision, CONFIG.text
    expected = Counter(run_on(mesh)["gathered"])
    if tensor > 1:  # the gradient of the encoder's q, k and v, whose weight `tensor` does not cut
        expected[f"all-gather f32[{rows},{PATCHES // parts},3,{vision.num_heads},{vision.head_dim}]"] += vision.num_layers
    if parts > 1:
        expected += between_parts(rows, parts, text.num_layers, TOKENS, text.num_kv_heads // tensor, text.head_dim)
        expected += between_parts(rows, parts, vision.num_layers, PATCHES, vision.num_heads // tensor, vision.head_dim)
        for slots in (PATCHES // 4, TARGETS):  # visual tokens to their places and supervised ones to the loss, and back
            expected[f"all-gather f32[{rows},{slots},{text.hidden_size}]"] += 1
            expected[f"reduce-scatter f32[{rows},{slots // parts},{text.hidden_size}]"] += 1
        expected[f"all-gather s32[{rows},{TARGETS}]"] += 1
    assert run_on(mesh)["moved"] == expected
    if tensor == 1:
        table = 4 * text.vocab_size * text.hidden_size  # tied: summed once for the lookup and once for the head
        once = run_on(mesh)["total_bytes"] + table
        more = (
            once if parts > 1 else 0
        )  # on CPU over one axis, then over the other; for TPU the compiler makes one sum of the two
        assert once <= run_on(mesh)["summed"] < once + more + 512, "each gradient once, and scalars: norms"


def between_parts(rows: int, parts: int, layers: int, tokens: int, heads: int, width: int) -> Counter:
    """What attention says: keys and values of whole rows once a layer, their gradients, and once where all tokens stand."""
    shape = "f32[{},{},{},{}]".format
    return Counter(
        {
            f"all-gather {shape(rows, heads, tokens, width)}": 2 * layers,
            f"reduce-scatter {shape(rows, heads, tokens // parts, width)}": 2 * layers,
            f"all-gather s32[{rows},{tokens}]": 2,
        }
    )


@pytest.mark.slow
def test_parameters_and_moments_are_stored_in_parts():
    whole, cut = run_on("data=8"), run_on("fsdp=8")
    assert cut["params_per_device"] < 1.35 * whole["params_per_device"] / 8  # vectors stay whole
    for run in (whole, cut):
        assert run["moments_per_device"] == pytest.approx(2 * run["params_per_device"], rel=0.01)  # and the counters


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("nano", "nano-siglip")])  # whose heads are three
@pytest.mark.parametrize("sizes", [{}, {"fsdp": 16}, {"data": 4, "fsdp": 8, "tensor": 2}, {"fsdp": 64, "tensor": 4}])
def test_the_rules_know_every_dimension_of_every_released_size(name, sizes):
    config, mesh = CONFIGS[name], mesh_of(**sizes)
    for param, at in zip(
        jax.tree.leaves(describe(config), is_leaf=is_param), jax.tree.leaves(param_shardings(config, mesh)), strict=True
    ):
        large = np.prod(param.shape) > 1 << 20
        assert not (large and at.is_fully_replicated and mesh.shape["fsdp"] > 1), param


def test_kv_heads_and_vocabulary_that_do_not_divide_stay_whole_and_the_rest_is_refused():
    rules, mesh = ShardingRules(), mesh_of(tensor=4)
    assert rules.spec(Param((66, 8), ("vocab", "embed")), mesh) == jax.sharding.PartitionSpec(None, None)
    with pytest.raises(avl.UserError, match=r"decoder.up: its dimension 'mlp' has size 30, expected a multiple of 4.*tensor"):
        rules.spec(Param((8, 30), ("embed", "mlp")), mesh, "decoder.up")
    few = CONFIG.text.num_kv_heads
    assert few % 4 and rules_for(tiny_config(vision={"num_heads": 4}), mesh).kv_heads == ()
    with pytest.raises(avl.UserError, match="vision.num_heads: found 2, expected a multiple of 4"):
        rules_for(CONFIG, mesh)


def test_a_mesh_axis_that_would_cut_twice_is_refused():
    with pytest.raises(avl.UserError, match="'tensor' cuts two of its dimensions embed, mlp"):
        ShardingRules(embed=("tensor",)).spec(Param((8, 8), ("embed", "mlp")), mesh_of(tensor=2))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected items like"), ("fsdp", "expected items like"), ("model=2", "data, fsdp, context, tensor"),
        ("fsdp=0", "positive number"), ("fsdp=two", "positive number"), ("fsdp=-1,data=-1", "are both -1"),
        ("fsdp=3", "needs 3 devices and finds 8"), ("fsdp=-1,data=3", "a multiple of 3 devices and finds 8"),
        ("fsdp=" + "9" * 30, "positive number"), ("fsdp=16", "needs 16 devices"),
    ],
)  # fmt: skip
def test_a_mesh_that_cannot_be_is_refused_in_a_sentence(text, message):
    with pytest.raises(avl.UserError, match=message):
        make_mesh(text, range(8))


@pytest.mark.parametrize(
    "budget, message",
    [
        (Budget(6, 8, 8, 8), "budget.rows: found 6, expected a multiple of 4, by --mesh: data x fsdp"),
        (Budget(8, 9, 8, 8), "budget.tokens: found 9, expected a multiple of 2, by --mesh: context"),
        (
            Budget(8, 8, 12, 8),
            "budget.patches: found 12, expected a multiple of 8, by --mesh: context x 4 of a visual token",
        ),
        (Budget(8, 8, 8, 7), "budget.targets: found 7, expected a multiple of 2, by --mesh: context"),
    ],
)
def test_a_budget_that_does_not_divide_is_refused(budget, message):
    check_budget(Budget(8, 8, 0, 8), mesh_of(data=2, fsdp=2, context=2, tensor=2))
    check_budget(Budget(8, 7, 5, 3), mesh_of(data=2, fsdp=2, tensor=2))
    with pytest.raises(avl.UserError, match=message):
        check_budget(budget, mesh_of(data=2, fsdp=2, context=2, tensor=2))


def test_attention_to_a_row_that_does_not_divide_is_refused():
    q, kv, place = jnp.ones((1, 5, 2, 4)), jnp.ones((1, 2, 5, 4)), Place(jnp.arange(5)[None])
    with jax.sharding.use_abstract_mesh(mesh_of(context=2)), pytest.raises(avl.UserError, match="5 tokens or patches, .* of 2"):
        attend(q, [Part(kv, kv, place, own=True)], place, True, "auto", 4)


def test_the_table_names_every_parameter_and_its_bytes():
    table = sharding_table(CONFIGS["andesvl-4b"], mesh_of(fsdp=8, context=4, tensor=2))
    assert table.splitlines()[0] == "mesh: fsdp 8 x context 4 x tensor 2"
    row = next(line for line in table.splitlines() if line.startswith("decoder.layers.gate")).split()
    assert row[1:] == ["36x2560x9728", "-,", "fsdp+context,", "tensor", f"{36 * 2560 * 9728 * 4 // 64:,}"]
    assert next(line for line in table.splitlines() if line.startswith("decoder.norm")).split()[-1] == "all"
    assert len(table.splitlines()) == 3 + len(jax.tree.leaves(describe(CONFIGS["andesvl-4b"]), is_leaf=is_param))


def test_collectives_in_loops_count_each_round():
    hlo = """HloModule jit_f
%add (a: f32[], b: f32[]) -> f32[] {
}
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ar = f32[4]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  %ag = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%y), dimensions={0}
}
%condition (p: (s32[], f32[4])) -> pred[] {
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"28"}}
  %cp = f32[3]{0} collective-permute(%z)
}
"""
    assert by_kind(collectives(hlo)) == {
        "all-gather": {"count": 28, "bytes": 28 * 16 * 8 * 2},
        "all-reduce": {"count": 28, "bytes": 28 * 4 * 4},
        "collective-permute": {"count": 1, "bytes": 12},
    }


def test_the_pieces_of_a_tpu_gather_count_once_and_its_loops_by_their_condition():
    hlo = """HloModule jit_f
%piece (a: bf16[2,8]) -> bf16[16,8] {
  %ag.2 = bf16[16,8]{1,0} all-gather(%a), channel_id=7, dimensions={0}
}
%inner (p: (s32[])) -> (s32[]) {
  %f = bf16[16,8]{1,0} fusion(%y), kind=kOutput, calls=%piece
}
%blocks (p: (s32[])) -> pred[] {
  %c.1 = s32[]{:T(128)} constant(16)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %c.1), direction=LT
}
%body (p: (s32[])) -> (s32[]) {
  %ag.1 = bf16[16,8]{1,0} all-gather(%y), channel_id=7, dimensions={0}
  %w.2 = (s32[]) while(%t), condition=%blocks, body=%inner
}
%layers (p: (s32[])) -> pred[] {
  %c.2 = s32[]{:T(128)} constant(28)
  ROOT %lt.2 = pred[]{:T(512)} compare(%i, %c.2), direction=LT
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w.1 = (s32[]) while(%t), condition=%layers, body=%body
}
"""
    assert by_kind(collectives(hlo)) == {"all-gather": {"count": 28, "bytes": 28 * 16 * 8 * 2}}


def test_collectives_on_one_channel_are_several_unless_they_are_pieces_of_one():
    """As jax writes those of a `shard_map`: all on channel 1, told apart by where they come from, and layers not even by that."""
    hlo = """HloModule jit_f
%piece (a: f32[2]) -> f32[4] {
  %g.1 = f32[4]{0} all-gather(%a), channel_id=1, metadata={op_name="f/keys" stack_frame_id=1}
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %g.2 = f32[4]{0} all-gather(%x), channel_id=1, metadata={op_name="f/keys" stack_frame_id=1}
  %g.3 = f32[4]{0} all-gather(%y), channel_id=1, metadata={op_name="f/keys" stack_frame_id=1}
  %g.4 = f32[4]{0} all-gather(%z), channel_id=1, metadata={op_name="f/values" stack_frame_id=2}
  %f = f32[4]{0} fusion(%y), kind=kOutput, calls=%piece
}
"""
    assert by_kind(collectives(hlo)) == {"all-gather": {"count": 3, "bytes": 3 * 4 * 4}}


def test_a_long_row_takes_a_part_of_the_memory():
    """Four devices to a row: a quarter of its activations, and whole rows of keys and values for a layer."""
    found = run_script("long_row.py", 4, "context=1", "context=4")
    assert found["context=4"] < 0.4 * found["context=1"], found


def test_a_run_on_a_mesh_of_one_device_equals_a_run_without(tiny_run, tmp_path):
    """The whole path of --mesh with what every machine has: losses to float32's last digits."""
    from andesvl_jax.training.loop import train
    from andesvl_jax.training.metrics import read_metrics

    short = replace(tiny_run, steps=3, checkpoint_every=3)
    losses = []
    for name, mesh in (("plain", None), ("mesh", "data=-1")):
        train(replace(short, mesh=mesh), tmp_path / name)
        losses.append([line["loss"] for line in read_metrics(tmp_path / name)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
