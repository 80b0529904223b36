"""What a run would cost on a TPU slice that nobody holds: its steps, compiled for a topology that is not attached.

Compiling needs the package libtpu and a CPU, no TPU. B batch rows, T tokens, K kv heads, C cache slots.
"""

import functools
import importlib.util
import os
import re
import time
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from andesvl_jax.config import AndesVLConfig
from andesvl_jax.decoding.sampling import sampling_options
from andesvl_jax.decoding.state import SessionState, decode_until, make_room, prefill
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.packing import Batch, assemble
from andesvl_jax.model.andesvl import AndesVL, describe, encode_images
from andesvl_jax.model.flops import forward_flops, step_flops
from andesvl_jax.training.collectives import by_kind, collectives
from andesvl_jax.training.config import PARTS, TrainConfig
from andesvl_jax.training.sharding import (
    IN_USE,
    ShardingRules,
    batch_sharding,
    batch_shards,
    check_budget,
    make_mesh,
    param_shardings,
    row_sharding,
    rules_for,
)
from andesvl_jax.training.step import init_state, state_shardings, train_step
from andesvl_jax.weights import abstract, is_param

STEPS = ("train", "prefill", "decode")
NEW_TOKENS = 256  # room behind the prompt in the cache of the decode step
MOST_CHIPS = 1 << 14
GIB = 1 << 30
_UNATTACHED = {  # libtpu asks no cloud machine what it is, and waits for no other process that holds a TPU
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
_TOPOLOGY = re.compile(r"\w{1,16}:(\d{1,5}(?:x\d{1,5}){1,2})", re.ASCII)
_NEEDED = re.compile(r"\((\d+(?:\.\d+)?)([KMGT]?)B?\) exceeds available HBM|Used (\d+(?:\.\d+)?)([KMGT]?)B? of")
_AVAILABLE = re.compile(r"available HBM \((\d+(?:\.\d+)?)([KMGT]?)B?\)|Used \S+ of (\d+(?:\.\d+)?)([KMGT]?)B? hbm")


@dataclass(frozen=True)
class StepCost:
    """One compiled step; bytes are those of one device, FLOPs those of one run of the step.

    hbm: by class: arguments, temporaries, outputs, aliased (outputs that take the place of arguments), code; the arguments alone
    where XLA gave up. hbm_bytes_per_device: their sum without what is aliased, or what XLA asked for.
    flops_per_step: the project's count for all devices; xla_flops_per_device: XLA's, which counts a loop's body once.
    xla_seconds: XLA's estimate, None where it gives none. collectives: {kind: {count, bytes}} that one device receives.
    advice: what to change when it does not fit.
    """

    fits: bool
    hbm: dict[str, int]
    hbm_bytes_per_device: int
    flops_per_step: int
    xla_flops_per_device: float | None
    xla_seconds: float | None
    collectives: dict[str, dict[str, int]]
    compile_seconds: float
    advice: str | None = None


def plan(
    config: TrainConfig, topology: str, mesh: str | None = None, steps: Sequence[str] = STEPS, progress=None
) -> dict[str, Any]:
    """Compiles the steps of a configuration for a slice.

    Args:
      config: its budget is the shape of a batch: `rows` packed rows to train on, or as many prompts of `tokens` tokens.
      topology: such as "v5e:16x16". mesh: as `make_mesh` reads it; None: the configuration's, or all of it over fsdp.
      progress: called with the name of a step before it is compiled.
    Returns:
      topology, devices, device_kind, mesh, hbm_limit (bytes of a device, None if XLA names none), steps: {name: StepCost as a
      dict}, fits (all of them), and once more the first step's other fields.
    Raises:
      UserError: no libtpu, an unknown topology, or a mesh or batch that does not divide.
    """
    devices = topology_devices(topology)
    over = make_mesh(mesh or config.mesh or "fsdp=-1", devices)
    check_budget(config.budget, over)
    limit = hbm_limit(devices[0])
    costs = {}
    for step in steps:
        if progress is not None:
            progress(step)
        costs[step] = step_cost(config, over, step, limit)
    first, *_ = costs.values()
    slice_ = {
        "topology": topology, "devices": len(devices), "device_kind": devices[0].device_kind, "hbm_limit": limit,
        "mesh": {axis: size for axis, size in over.shape.items() if size > 1},
    }  # fmt: skip
    all_steps = {"fits": all(cost.fits for cost in costs.values()), "steps": {name: asdict(cost) for name, cost in costs.items()}}
    return slice_ | asdict(first) | all_steps


def topology_devices(name: str) -> list[Any]:
    """The devices of an unattached slice. Raises UserError for a missing libtpu or a name that it does not know."""
    shape = _TOPOLOGY.fullmatch(name)
    example = "expected a chip and a layout of chips such as v5e:4x4, v5e:16x16 or v6e:8x8"
    if shape is None or not 0 < prod(map(int, shape[1].split("x"))) <= MOST_CHIPS:
        raise UserError(f"--topology {name[:80]!r}: is no topology of at most {MOST_CHIPS:,} chips, {example}.")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {name}: needs the package libtpu, which is not installed: pip install 'andesvl-jax[tpu-aot]'."
        )
    os.environ |= _UNATTACHED
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology {name}: libtpu refuses it ({_sentence(error)}), {example}.") from error


def hbm_limit(device: Any) -> int | None:
    """Bytes that a program may use of a device, in the compiler's words: what it says of one that could never fit."""
    argument = jax.ShapeDtypeStruct((1 << 42,), jnp.int8, sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(argument).compile()
    except jax.errors.JaxRuntimeError as error:
        return _bytes(_AVAILABLE, str(error))
    return None


def step_cost(config: TrainConfig, mesh: Mesh, step: str, limit: int | None) -> StepCost:
    """Compiles one of `STEPS` for the devices of a mesh, attached or not. limit: bytes that a device has."""
    began = time.perf_counter()
    program, *arguments = _PROGRAMS[step](config, mesh)
    shapes = [x for x in jax.tree.leaves(arguments) if isinstance(x, jax.ShapeDtypeStruct)]
    held = sum(prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in shapes)
    with jax.sharding.set_mesh(mesh):  # what `target_platform` goes by
        lowered = program.lower(*arguments)
    flops = own_flops(config, step)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        needed = _bytes(_NEEDED, str(error)) or 0
        advice = knob(config, mesh, step, held, limit)
        seconds = time.perf_counter() - began
        return StepCost(False, {"arguments": held}, max(needed, held), flops, None, None, {}, seconds, advice)
    seconds = time.perf_counter() - began
    hbm, total = hbm_classes(compiled)
    fits = limit is None or total <= limit
    analysis = compiled.cost_analysis() or {}
    estimate = analysis.get("optimal_seconds", 0.0)
    return StepCost(
        fits, hbm, total, flops, analysis.get("flops"),
        estimate if estimate > 0 else None,  # each part that XLA cannot judge takes a second off
        by_kind(collectives(compiled.as_text())), seconds, None if fits else knob(config, mesh, step, held, limit),
    )  # fmt: skip


def hbm_classes(compiled) -> tuple[dict[str, int], int]:
    """Bytes on one device by class, and all of them at once."""
    memory = compiled.memory_analysis()
    classes = {
        "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes, "aliased": memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }  # fmt: skip
    return classes, sum(classes.values()) - 2 * classes["aliased"]


def own_flops(config: TrainConfig, step: str) -> int:
    """Explicit count of the matrix products of one step for all rows; decode: one token behind `tokens` others."""
    model, budget = config.model, config.budget
    if step == "train":
        trained = [part for part in PARTS if getattr(config.optimizer, part) > 0]
        return step_flops(model, *(budget.rows, *budget.sizes), trained)
    count = lambda tokens, patches, outputs: sum(forward_flops(model, budget.rows, tokens, patches, outputs).values())  # noqa: E731
    if step == "prefill":
        return count(budget.tokens, budget.patches, 1)
    return count(budget.tokens + 1, 0, 1) - count(budget.tokens, 0, 0)


def knob(config: TrainConfig, mesh: Mesh, step: str, held: int, limit: int | None) -> str:
    """Which setting helps a step that does not fit; held: bytes of its arguments on a device."""
    rows = config.budget.rows // batch_shards(mesh)
    if limit is not None and held > 0.6 * limit:  # parameters, moments or cache
        if step != "train":
            return "its weights and cache fill the device: give --mesh a larger tensor, or budget.rows or budget.tokens less"
        if mesh.shape["data"] > 1:
            return "parameters and moments fill the device: move devices from data to fsdp in --mesh"
        return "parameters and moments fill the device: take a larger slice and give its devices to fsdp, or a smaller model"
    if step == "train" and config.model.remat != "layer":
        return "activations fill the device: --set model.remat=layer keeps one per layer"
    if rows > 1:
        return (
            f"activations fill the device: --set budget.rows={config.budget.rows // rows} leaves each device one row, not {rows}"
        )
    return "activations of one row fill the device: --set budget.tokens and budget.patches lower, or give --mesh a larger context"


def _train(config: TrainConfig, mesh: Mesh) -> tuple:
    at = state_shardings(config.model, config.optimizer, mesh)
    state = jax.tree.map(_placed, jax.eval_shape(functools.partial(init_state, config)), at)
    return train_step, state, _batch(config, mesh), config.model, config.optimizer, config.steps, mesh


def _prefill(config: TrainConfig, mesh: Mesh) -> tuple:
    params, batch = _weights(config.model, mesh), _batch(config, mesh)
    state = jax.eval_shape(_prompts_read(config.model), params, batch)
    return jax.jit(_prompts_read(config.model), out_shardings=_session_shardings(state, config.model, mesh)), params, batch


def _decode(config: TrainConfig, mesh: Mesh) -> tuple:
    params, batch = _weights(config.model, mesh), _batch(config, mesh)
    state = jax.eval_shape(_prompts_read(config.model), params, batch)
    state = jax.eval_shape(functools.partial(make_room, slots=NEW_TOKENS, new_tokens=NEW_TOKENS), state)
    by_row, whole = row_sharding(mesh), NamedSharding(mesh, P())
    state = jax.tree.map(_placed, state, _session_shardings(state, config.model, mesh))
    options = jax.tree.map(lambda x: _placed(x, by_row), jax.eval_shape(functools.partial(sampling_options, config.budget.rows)))
    number = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)  # noqa: E731
    return decode_until, params, config.model, state, options, number(1), number()


# (config, mesh) -> a jitted function and its arguments as shapes that know their places
_PROGRAMS: dict[str, Callable[[TrainConfig, Mesh], tuple]] = {"train": _train, "prefill": _prefill, "decode": _decode}


def _prompts_read(config: AndesVLConfig) -> Callable:
    """(params, batch) -> what `prefill` returns, the pictures encoded on the way."""

    def read(params: AndesVL, batch: Batch):
        visual = None if batch.images is None else encode_images(params, config, batch.images)
        return prefill(params, config, batch.tokens, batch.positions, visual, batch.visual_index)

    return read


def _batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """Shapes of a batch, in its parts over the mesh."""
    one = assemble([], replace(config.budget, rows=1), config.model.vision.patch_features)
    widen = lambda x: jax.ShapeDtypeStruct((config.budget.rows, *x.shape[1:]), x.dtype, sharding=batch_sharding(mesh))  # noqa: E731
    return jax.tree.map(widen, one)


def _weights(config: AndesVLConfig, mesh: Mesh) -> AndesVL:
    """Shapes of the parameters as generation holds them: in the compute type, cut by `tensor` alone, so that no token waits for
    a weight to be gathered."""
    at = param_shardings(config, mesh, IN_USE)
    return jax.tree.map(lambda p, at: _placed(abstract(p, config.dtype), at), describe(config), at, is_leaf=is_param)


def _session_shardings(state: SessionState, config: AndesVLConfig, mesh: Mesh) -> SessionState:
    """By row; the arrays [L, B, K, ...] of the cache also between kv heads where `tensor` divides them."""
    by_head = NamedSharding(mesh, P(None, ShardingRules().batch, rules_for(config, mesh).kv_heads or None))
    return jax.tree.map(lambda x: by_head if x.ndim > 2 else row_sharding(mesh), state)


def _placed(x, at: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)


def _bytes(pattern: re.Pattern, message: str) -> int | None:
    found = pattern.search(message)
    if found is None:
        return None
    number, unit = (part for part in found.groups() if part is not None)
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _sentence(error: Exception) -> str:
    """The first line of XLA's message without its status, at most 200 characters."""
    return str(error).splitlines()[0].partition(": ")[2].rstrip(".")[:200]


def plan_table(result: dict[str, Any]) -> str:
    """What `plan` found, a column for each step."""
    steps = result["steps"]
    kinds = sorted({kind for cost in steps.values() for kind in cost["collectives"]})
    gib = lambda x: "-" if x is None else f"{x / GIB:,.2f} GiB"  # noqa: E731
    number = lambda x, unit: "-" if x is None else f"{x:,.4g} {unit}"  # noqa: E731
    tera = lambda x: number(None if x is None else x / 1e12, "TFLOP")  # noqa: E731
    travel = lambda c: "-" if c is None else f"{c['count']:,} x, {gib(c['bytes'])}"  # noqa: E731
    lines: list[tuple[str, Callable[[dict], str]]] = [
        *((name, lambda c, n=name: gib(c["hbm"].get(n))) for name in ("arguments", "temporaries", "outputs", "aliased", "code")),
        ("HBM of a device in all", lambda c: gib(c["hbm_bytes_per_device"])),
        ("fits", lambda c: "yes" if c["fits"] else "NO"),
        ("own count, all devices", lambda c: tera(c["flops_per_step"])),
        ("own count, a device", lambda c: tera(c["flops_per_step"] / result["devices"])),
        ("XLA's, a device, loops once", lambda c: tera(c["xla_flops_per_device"])),
        ("XLA's estimate", lambda c: number(c["xla_seconds"], "s")),
        *((kind, lambda c, k=kind: travel(c["collectives"].get(k))) for kind in kinds),
        ("compiled in", lambda c: f"{c['compile_seconds']:.0f} s"),
    ]
    axes = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items()) or "one device"
    head = f"{result['topology']}: {result['devices']} x {result['device_kind']}, {gib(result['hbm_limit'])} each; mesh: {axes}"
    table = [f"{'':28s}" + "".join(f"{name:>24s}" for name in steps)]
    table += [f"{name:28s}" + "".join(f"{cell(cost):>24s}" for cost in steps.values()) for name, cell in lines]
    return "\n".join([head, *table, *shortages(result)])


def shortages(result: dict[str, Any]) -> list[str]:
    """One sentence for each step that does not fit: by how much, and what helps."""
    limit = result["hbm_limit"]
    out = []
    for name, cost in result["steps"].items():
        if not cost["fits"]:
            needed, over = cost["hbm_bytes_per_device"] / GIB, (cost["hbm_bytes_per_device"] - (limit or 0)) / GIB
            found = (
                f"needs {needed:,.2f} GiB of {limit / GIB:,.2f} GiB per device, {over:,.2f} GiB too much"
                if limit and over > 0
                else ("does not fit")
            )
            out.append(f"{name}: {found}; {cost['advice']}.")
    return out
