"""Sharding by one knob: `data=2,fsdp=4,tensor=2` -> a mesh, and from the names of a parameter's dimensions its layout on it.

Parameters, gradients and moments are stored in parts over `fsdp`, `context` and `tensor`; rows of a batch go over `data` and
`fsdp`, what a row holds over `context` (`model.context`). A matrix of a layer is gathered over `fsdp` and `context` where the
layer runs (`weights.gathered`), what stands outside the layers once a step; over `tensor` it is never gathered: heads, mlp
channels and vocabulary entries stay where they are.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Callable, Sequence

import jax
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from andesvl_jax.config import AndesVLConfig
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.packing import MERGED, Budget
from andesvl_jax.model.andesvl import AndesVL, describe
from andesvl_jax.model.devices import HEAD_AXES, ROW_AXES
from andesvl_jax.weights import CONTEXT, Gathered, LoRA, Param, Recipe, dense, is_leaf, is_param, path_name
from andesvl_jax.weights.gathered import relayout

MESH_AXES = ("data", "fsdp", CONTEXT, "tensor")  # slowest to fastest: neighbours on the interconnect share `tensor`
STORED = ("fsdp", CONTEXT)  # mesh axes over which weights are stored in parts and gathered for use
Axes = tuple[str, ...]


@dataclass(frozen=True)
class ShardingRules:
    """For each logical axis name of `Param.axes` the mesh axes that cut it; () leaves it whole.

    Vectors (norms, biases) are too small to gather and leave `STORED` out. A dimension that does not divide is refused, except
    for the names in `or_replicated`, which are then left whole.
    """

    batch: Axes = ROW_AXES
    layers: Axes = ()
    embed: Axes = STORED
    merged: Axes = STORED
    mlp: Axes = ("tensor",)
    heads: Axes = HEAD_AXES
    kv_heads: Axes = ("tensor",)
    qkv: Axes = ()  # the encoder's q, k and v side by side: a cut would run through the borders between them
    vocab: Axes = ("tensor",)
    head_dim: Axes = ()
    patch: Axes = ()
    table: Axes = ()
    or_replicated: Axes = ("kv_heads", "vocab")

    def spec(self, param: Param, mesh: Mesh, name: str = "parameter") -> P:
        """The layout of an array by its dimensions' names; mesh axes of size 1 are left out.

        Raises:
          UserError: a dimension does not divide, or one mesh axis would cut two dimensions; `name` says of what.
        """
        matrix = len(param.shape) - param.stacked > 1
        named = zip(param.axes, param.shape, strict=True)
        cuts = [self._cut(axis, size, mesh, name, param.or_replicated) for axis, size in named]
        if not matrix:
            cuts = [tuple(a for a in cut if a not in STORED) for cut in cuts]
        used = [axis for cut in cuts for axis in cut]
        twice = next((axis for axis in used if used.count(axis) > 1), None)
        if twice is not None:
            raise UserError(
                f"sharding of {name}: mesh axis {twice!r} cuts two of its dimensions {', '.join(map(str, param.axes))}, expected "
                "at most one; change the rules."
            )
        return P(*(cut[0] if len(cut) == 1 else cut or None for cut in cuts))

    def _cut(self, axis: str | None, size: int, mesh: Mesh, name: str, or_replicated: bool) -> Axes:
        cut = () if axis is None else tuple(a for a in getattr(self, axis) if mesh.shape[a] > 1)
        parts = math.prod(mesh.shape[a] for a in cut)
        if size % parts == 0:
            return cut
        if or_replicated or axis in self.or_replicated:
            return ()
        raise UserError(
            f"sharding of {name}: its dimension {axis!r} has size {size}, expected a multiple of {parts}, the size of mesh axis "
            f"{' x '.join(cut)}; choose another --mesh."
        )


IN_USE = ShardingRules(embed=(), merged=())  # of weights that are gathered: `tensor` alone cuts them


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """ "data=2,fsdp=-1" over all devices (or those given); -1 is what the others leave, axes that are not named have size 1.

    Raises:
      UserError: an unknown axis, a size that is no number, two times -1, or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict.fromkeys(MESH_AXES, 1)
    for item in text.split(","):
        axis, separator, number = item.strip().partition("=")
        if axis not in sizes or not separator:
            raise UserError(f"--mesh {text!r}: found {item!r}, expected items like fsdp=4 of {', '.join(MESH_AXES)}.")
        if not (number == "-1" or (number.isdecimal() and 0 < int(number) <= 1 << 20)):
            raise UserError(f"--mesh {text!r}: {axis} is {number!r}, expected a positive number, or -1 for the rest.")
        sizes[axis] = int(number)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1:
        raise UserError(f"--mesh {text!r}: {' and '.join(open_axes)} are both -1, expected one axis for the rest.")
    if open_axes and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"--mesh {text!r}: needs {'a multiple of ' if open_axes else ''}{fixed} devices and finds {len(devices)}; expected a "
            "product that equals them."
        )
    shape = tuple(sizes.values())
    # an 8 x 8 slice has no axis of 16 chips: 4 x 16 needs one of its axes in two
    layout = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(layout, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def rules_for(config: AndesVLConfig, mesh: Mesh, rules: ShardingRules = ShardingRules()) -> ShardingRules:
    """The rules that hold for this network on this mesh: heads are cut between heads, never through one.

    Raises:
      UserError: a number of heads that `tensor` does not divide (kv heads are then held whole).
    """
    parts = mesh.shape["tensor"]
    for field, heads in (("text.num_heads", config.text.num_heads), ("vision.num_heads", config.vision.num_heads)):
        if heads % parts:
            raise UserError(f"config field {field}: found {heads}, expected a multiple of {parts}, the size of mesh axis tensor.")
    return replace(rules, kv_heads=()) if config.text.num_kv_heads % parts else rules


def param_shardings(
    config: AndesVLConfig, mesh: Mesh, rules: ShardingRules = ShardingRules(), recipe: Recipe | None = None
) -> AndesVL:
    """Where every parameter is stored: the tree of parameters with `NamedSharding` leaves. Raises UserError as `rules_for`."""
    rules = rules_for(config, mesh, rules)
    at = lambda path, p: NamedSharding(mesh, rules.spec(p, mesh, path_name(path)))  # noqa: E731
    return jax.tree_util.tree_map_with_path(at, describe(config, recipe), is_leaf=is_param)


def placement(config: AndesVLConfig, mesh: Mesh | None) -> Callable[[Param], NamedSharding] | None:
    """What `checkpoints.hf.load` asks for: where an array is stored. None without a mesh."""
    if mesh is None:
        return None
    rules = rules_for(config, mesh)
    return lambda param: NamedSharding(mesh, rules.spec(param, mesh))


def optimizer_shardings(transform: optax.GradientTransformation, params: AndesVL, shardings: AndesVL, mesh: Mesh) -> Any:
    """Moments lie as the parameters they belong to (`params` may be abstract), counters on every device."""
    absent = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731  # parameters of another part's transform
    return optax.tree_utils.tree_map_params(
        transform, lambda held, at: held if absent(held) else at, jax.eval_shape(transform.init, params), shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()), is_leaf=absent,
    )  # fmt: skip


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Of an array [B, ...]: rows over data and fsdp."""
    return NamedSharding(mesh, P(ShardingRules().batch))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a `Batch`: rows over data and fsdp, tokens, patches and targets of a row over context."""
    return NamedSharding(mesh, P(ShardingRules().batch, CONTEXT))


def batch_shards(mesh: Mesh | None) -> int:
    """Parts that the rows of a batch are cut into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ShardingRules().batch)


def sum_over_parts(fn: Callable, mesh: Mesh | None) -> Callable:
    """fn(params, *arrays [B, T, ...]) -> sums over rows and tokens, run by each device on its own part; what comes out is summed
    over all.

    Parameters are each device's own inside, so that a loop there adds up their gradient on each device, and the devices' sums
    travel once, not every round.
    """
    if mesh is None:
        return fn
    part = batch_sharding(mesh).spec
    axes = (*ShardingRules().batch, CONTEXT)
    own = lambda params: jax.tree.map(lambda w: jax.lax.pcast(w, axes, to="varying"), params)  # noqa: E731
    local = lambda params, *arrays: jax.lax.psum(fn(own(params), *arrays), axes)  # noqa: E731
    return lambda params, *arrays: jax.shard_map(
        local, mesh=mesh, in_specs=(P(), *[part] * len(arrays)), out_specs=P(), axis_names=set(axes)
    )(params, *arrays)


def check_budget(budget: Budget, mesh: Mesh) -> None:
    """Raises UserError when the rows of a batch, or what a row holds, do not divide among the devices."""
    blocks = mesh.shape[CONTEXT]
    for field, parts, of in (
        ("rows", batch_shards(mesh), "data x fsdp"),
        ("tokens", blocks, "context"),
        ("patches", blocks * MERGED if blocks > 1 else 1, f"context x {MERGED} of a visual token"),
        ("targets", blocks, "context"),
    ):
        if (found := getattr(budget, field)) % parts:
            raise UserError(f"training field budget.{field}: found {found}, expected a multiple of {parts}, by --mesh: {of}.")


def gather(params: AndesVL, config: AndesVLConfig, mesh: Mesh, recipe: Recipe | None = None) -> AndesVL:
    """Parameters as the network uses them: whole but for `tensor`, matrices of layers as leaves that are gathered one layer at a
    time."""
    shardings = (param_shardings(config, mesh, rules, recipe) for rules in (ShardingRules(), IN_USE))
    leaf = functools.partial(_gather_leaf, dtype=config.dtype, context=mesh.shape[CONTEXT])
    return jax.tree.map(leaf, describe(config, recipe), params, *shardings, is_leaf=lambda x: is_param(x) or is_leaf(x))


def _gather_leaf(described, w, stored, used, dtype: str, context: int):
    if isinstance(described, LoRA):  # the base and each half of the adapter by itself
        part = functools.partial(_gather_leaf, dtype=dtype, context=context)
        parts = {name: part(*(getattr(x, name) for x in (described, w, stored, used))) for name in ("base", "a", "b")}
        return w.replace(**parts)
    params = jax.tree.leaves(described, is_leaf=is_param)
    stored, used = (tuple(jax.tree.leaves(shardings)) for shardings in (stored, used))
    if params[0].stacked:
        stored, used = (tuple(map(_of_one_layer, shardings)) for shardings in (stored, used))
        return w if stored == used else Gathered(w, stored, used)
    if stored != used and not is_leaf(w):
        w, stored = relayout(dense(w, dtype), stored[0], used[0]), used
    matrix = len(params[0].shape) == 2 and params[0].init not in ("table", "position")
    return Gathered(w, stored, used) if stored != used or (matrix and context > 1) else w


def _of_one_layer(stacked: NamedSharding) -> NamedSharding:
    return NamedSharding(stacked.mesh, P(*stacked.spec[1:]))


def sharding_table(config: AndesVLConfig, mesh: Mesh) -> str:
    """One line per parameter: its name, shape, layout, bytes on each device, and whether all devices hold all of it."""
    flat, _ = jax.tree_util.tree_flatten_with_path(describe(config), is_leaf=is_param)
    size = jax.numpy.dtype(config.param_dtype).itemsize
    rows, total = [], 0
    for (path, param), at in zip(flat, jax.tree.leaves(param_shardings(config, mesh)), strict=True):
        held = size * math.prod(at.shard_shape(param.shape))
        total += held
        layout = ", ".join("+".join(part) if isinstance(part, tuple) else part or "-" for part in at.spec)
        rows.append(
            (path_name(path), "x".join(map(str, param.shape)), layout, f"{held:,}", "all" if at.is_fully_replicated else "")
        )
    axes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    head = ("parameter", "shape", "layout", "bytes per device", "replicated")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    return "\n".join([f"mesh: {axes}", *lines, f"parameters: {total:,} bytes per device; Adam's moments twice as many"])
