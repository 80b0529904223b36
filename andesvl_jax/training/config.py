"""What a training run is: one frozen dataclass, made by a Python file under configs/ and changed by `--set key=value`."""

import ast
import dataclasses
import difflib
import inspect
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Mapping, Sequence

from andesvl_jax.config import CONFIGS, AndesVLConfig
from andesvl_jax.data.mixture import Mixture
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.training.objectives import CrossEntropy, Objective
from andesvl_jax.weights import Adapt, Rule

PARTS = ("vision", "projector", "decoder")


@dataclass(frozen=True)
class Optimizer:
    """AdamW. Learning rates are peaks per part; 0 freezes the part."""

    vision: float = 8e-4
    projector: float = 8e-4
    decoder: float = 8e-4
    warmup_steps: int = 20
    final_fraction: float = 0.02  # of the peak, where the cosine ends
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.05  # on matrices and tables, not on norms and biases
    clip_norm: float = 5.0


@dataclass(frozen=True)
class Adapters:
    """Ranks of new LoRA adapters per part, 0 = none. With any, the run trains adapters alone and writes a PEFT directory.

    Attributes:
      alpha: scales what an adapter adds, by alpha / rank, or alpha / sqrt(rank) if rank_stabilized (rsLoRA, arXiv 2312.03732).
      matrices: regular expression of the names of adapted matrices; other parts have other ones.
    """

    vision: int = 0
    projector: int = 0
    decoder: int = 0
    alpha: float = 16.0
    rank_stabilized: bool = False
    matrices: str = "q|k|v|o|gate|up|down|qkv|proj|fc1|fc2|fc3"

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What makes the adapters out of a base."""
        ranks = {part: getattr(self, part) for part in PARTS}
        return tuple(
            Rule(rf"{part}\.(layers\.)?({self.matrices})", Adapt(rank, float(self.alpha), self.rank_stabilized))
            for part, rank in ranks.items()
            if rank != 0
        )


@dataclass(frozen=True)
class TrainConfig:
    model: AndesVLConfig = CONFIGS["pico"]
    init_from: str | None = None  # checkpoint directory to start from
    tokenizer: str | None = None  # directory with tokenizer.json; None: that of init_from
    data: Mixture = field(default_factory=Mixture)
    budget: Budget = Budget(rows=6, tokens=512, patches=448, targets=224)
    objective: Objective = CrossEntropy()
    adapters: Adapters = Adapters()
    accumulate: int = 1  # micro-batches of a step, each of `budget`
    loss_average: Literal["token", "square", "sample"] = "token"  # what a supervised token weighs, see `inputs.packing.Sample`
    max_size: int = 733  # square root of the pixel budget of a picture
    min_tokens: int = 4  # pictures with fewer visual tokens are scaled up
    optimizer: Optimizer = Optimizer()
    mesh: str | None = None  # "data=2,fsdp=-1", see `training.sharding.make_mesh`; None: one device
    workers: int = 0  # processes of a host that make batches; 0: threads, enough where a step takes long
    steps: int = 1000
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    keep: int = 2  # checkpoints

    def __post_init__(self):
        for name in ("steps", "log_every", "checkpoint_every", "keep", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"training field {name}: found {getattr(self, name)}, expected at least 1.")
        if self.workers < 0 or self.data.shards % max(1, self.workers):
            raise UserError(
                f"training field workers: found {self.workers}, expected 0 or a divisor of data.shards = {self.data.shards}."
            )
        if self.optimizer.warmup_steps >= self.steps:
            raise UserError(
                f"training field steps: found {self.steps}, expected more than warmup_steps = {self.optimizer.warmup_steps}."
            )
        if self.loss_average not in ("token", "square", "sample"):
            raise UserError(f"training field loss_average: found {self.loss_average!r}, expected 'token', 'square' or 'sample'.")
        if all(getattr(self.optimizer, part) == 0 for part in PARTS):
            raise UserError("training field optimizer: every part has learning rate 0, expected one that trains.")
        if self.adapters.rules and self.init_from is None:
            raise UserError(
                "training field adapters: there is no base, expected init_from (a checkpoint directory or a name that ships)."
            )
        for part in PARTS:
            if getattr(self.adapters, part) and getattr(self.optimizer, part) == 0:
                raise UserError(
                    f"training field optimizer.{part}: found 0, expected a learning rate for the adapters of that part."
                )


def load_config(path: str, changes: Sequence[str] = ()) -> TrainConfig:
    """Runs a config file's `get_config()` and applies "optimizer.decoder=1e-3"-style changes.

    Args:
      path: of the file; "configs/stages.py:nano/sft" takes one of several configurations of a file, `get_config("nano/sft")`.
    Raises:
      UserError: no such file, function or configuration, an unknown field, or a value that is no Python literal.
    """
    file, separator, name = path.rpartition(":")
    file, names = (file, [name]) if separator and not Path(path).is_file() else (path, [])
    if not Path(file).is_file():
        raise UserError(f"{file}: no such config file.")
    make = runpy.run_path(file).get("get_config")
    if make is None:
        raise UserError(f"{file}: has no get_config(), expected a function that returns a TrainConfig.")
    parameters = inspect.signature(make).parameters
    if len(names) != len(parameters):
        raise UserError(
            f"{path}: {'holds one configuration' if names else 'holds several'}, expected {file}{'' if names else ':NAME'}."
        )
    return with_changes(make(*names), changes)


def named_config(configs: Mapping[str, TrainConfig], name: str, file: str) -> TrainConfig:
    """One of several configurations of a file. Raises UserError for a name that there is not."""
    if name not in configs:
        near = difflib.get_close_matches(name, configs, 1, cutoff=0)
        raise UserError(f"{file}: has no configuration {name!r}; expected one of {len(configs)}, such as {near[0]}.")
    return configs[name]


def with_changes(config: TrainConfig, changes: Sequence[str]) -> TrainConfig:
    """Applies "key.subkey=value" changes. Raises UserError for an unknown field or a value of another type."""
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator:
            raise UserError(f"--set {change!r}: expected key=value.")
        config = _with_field(config, key.split("."), _literal(text), key)
    return config


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _with_field(config: Any, path: list[str], value: Any, key: str) -> Any:
    if not dataclasses.is_dataclass(config):
        raise UserError(f"--set {key}: {path[0]!r} is inside a plain value, expected the name of the whole value.")
    names = [f.name for f in dataclasses.fields(config)]
    if path[0] not in names:
        near = difflib.get_close_matches(path[0], names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}."
        raise UserError(f"--set {key}: unknown field {path[0]!r}; {hint}")
    old = getattr(config, path[0])
    new = value if len(path) == 1 else _with_field(old, path[1:], value, key)
    if isinstance(old, (int, float)) and not isinstance(new, (int, float)):
        raise UserError(f"--set {key}: found {new!r}, expected a number like {old!r}.")
    return dataclasses.replace(config, **{path[0]: new})
