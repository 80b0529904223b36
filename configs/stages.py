"""The four stages that lead to an instruct model, for `nano` and each released size: alignment, joint, multi-task, SFT.

Commands:

    andesvl train --config configs/stages.py:andesvl-1b/sft --out out/sft --set init_from=out/multi-task/model
    python configs/stages.py            # the table of docs/stages.md

The report names the pre-training stages and no number of them; rates, sizes and lengths here are this project's own.
"""

from dataclasses import dataclass, replace

from andesvl_jax.config import CONFIGS
from andesvl_jax.data.mixture import Mixture
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.training.config import PARTS, Optimizer, TrainConfig, named_config


@dataclass(frozen=True)
class Stage:
    """rates: peaks of encoder, projector, decoder, 0 = frozen. max_size: side in pixels of the largest square picture."""

    rates: tuple[float, float, float]
    max_size: int
    tokens: int
    steps: int
    rows: int  # with tokens: about a million tokens an update
    resize: str = "none"


RELEASED = {
    "alignment": Stage((0, 1e-3, 0), 448, 4096, 2_000, 256),
    "joint": Stage((1e-5, 1e-4, 5e-5), 733, 4096, 20_000, 256, resize="slight"),
    "multi-task": Stage((1e-5, 5e-5, 5e-5), 1792, 16384, 10_000, 64, resize="wide"),
    "sft": Stage((2e-6, 1e-5, 1e-5), 1792, 16384, 5_000, 64, resize="slight"),
}
# `nano` begins with nothing, so that its encoder learns from the first stage on
NANO = {
    "alignment": Stage((1.5e-3, 1.5e-3, 1.5e-3), 140, 224, 320, 6),
    "joint": Stage((1.5e-3, 1.5e-3, 1.5e-3), 140, 224, 640, 6),
    "multi-task": Stage((1e-3, 1e-3, 1e-3), 140, 224, 640, 6),
    "sft": Stage((5e-4, 5e-4, 5e-4), 140, 224, 320, 6),
}
NANO_DATA = {
    "alignment": {"word": 1.0},
    "joint": {"word": 1.0, "number": 2.0, "handwritten": 3.0},
    "multi-task": {"shapes": 1.0, "word": 0.3, "handwritten": 0.3, "chart": 0.2},
    "sft": {"shapes": 2.0, "word": 1.0, "number": 0.6, "handwritten": 1.5, "chart": 1.0, "screen": 1.0},
}


def released(model: str, stage: Stage) -> TrainConfig:
    """A stage of a released size: bfloat16 over float32 parameters, layers recomputed, everything spread over all devices."""
    return TrainConfig(
        model=CONFIGS[model].replace(dtype="bfloat16", remat="layer"), mesh="fsdp=-1", data=Mixture(resize=stage.resize),
        budget=Budget(stage.rows, stage.tokens, patches=2 * stage.tokens, targets=stage.tokens // 2), max_size=stage.max_size,
        optimizer=_optimizer(stage, warmup_steps=stage.steps // 50, weight_decay=0.05, clip_norm=1.0), steps=stage.steps,
    )  # fmt: skip


def nano(name: str) -> TrainConfig:
    """A stage that a laptop runs in a minute or two."""
    stage = NANO[name]
    return TrainConfig(
        budget=Budget(stage.rows, stage.tokens, patches=112, targets=96), max_size=stage.max_size, min_tokens=1,
        data=Mixture(NANO_DATA[name]), loss_average="square", optimizer=_optimizer(stage), steps=stage.steps,
    )  # fmt: skip


def _optimizer(stage: Stage, **options) -> Optimizer:
    return replace(Optimizer(**dict(zip(PARTS, stage.rates, strict=True))), **options)


ALL = {f"nano/{name}": nano(name) for name in NANO} | {
    f"{model}/{name}": released(model, stage) for model in CONFIGS if model != "nano" for name, stage in RELEASED.items()
}


def get_config(name: str) -> TrainConfig:
    return named_config(ALL, name, __file__)


def table() -> str:
    """One line per stage; the released sizes share theirs."""
    head = ("model", "stage", "trained", "peak rates: encoder, projector, decoder", "largest picture", "tokens of a row",
            "patches of a row", "rows", "steps")  # fmt: skip
    lines = []
    for model, stages in (("nano", NANO), ("0.6B, 1B, 2B, 4B", RELEASED)):
        for name, stage in stages.items():
            config = ALL[f"{'nano' if model == 'nano' else 'andesvl-1b'}/{name}"]
            trained = [p for p in PARTS if getattr(config.optimizer, p)]
            rates = ", ".join(f"{getattr(config.optimizer, p):g}" for p in PARTS)
            budget = config.budget
            lines.append(
                (
                    model,
                    name,
                    "all" if len(trained) == 3 else ", ".join(trained),
                    rates,
                    f"{stage.max_size} x {stage.max_size}",
                    f"{budget.tokens:,}",
                    f"{budget.patches:,}",
                    str(budget.rows),
                    f"{config.steps:,}",
                )  # fmt: skip
            )
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


if __name__ == "__main__":
    print(table())
