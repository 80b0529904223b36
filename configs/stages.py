"""The four stages that lead to an instruct model, for `nano` and each released size: alignment, joint, multi-task, SFT.

Commands:

    andesvl train --config configs/stages.py:andesvl-1b/sft --out out/sft --set init_from=out/multi-task/model
    andesvl train --config configs/stages.py:nano/look-up --out out/look-up --set init_from=nano --set model.dtype=bfloat16 \
        --set model.attention_chunk=2048 --set budget.rows=15 --set data.shards=15 --set workers=15     # on one GPU with 16 cores
    python configs/stages.py            # the table of docs/stages.md

The report names the pre-training stages and no number of them; rates, sizes and lengths here are this project's own, and so are
`print` and `look-up`, parts of nano's multi-task stage in which it learns to read small letters, and to find them.
"""

from dataclasses import dataclass, replace

from andesvl_jax.config import CONFIGS
from andesvl_jax.data.mixture import Mixture
from andesvl_jax.data.registry import TASKS
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.training.config import PARTS, Optimizer, TrainConfig, named_config


@dataclass(frozen=True)
class Stage:
    """rates: peaks of encoder, projector, decoder, 0 = frozen. max_size: side in pixels of the largest square picture."""

    rates: tuple[float, float, float]
    max_size: int
    tokens: int
    steps: int
    rows: int
    patches: int
    targets: int
    resize: str = "none"
    final_fraction: float = 0.02  # of the rates, where the stage ends


RELEASED = {  # rows times tokens: about a million tokens an update
    "alignment": Stage((0, 1e-3, 0), 448, 4096, 2_000, 256, 8192, 2048),
    "joint": Stage((1e-5, 1e-4, 5e-5), 733, 4096, 20_000, 256, 8192, 2048, "slight"),
    "multi-task": Stage((1e-5, 5e-5, 5e-5), 1792, 16384, 10_000, 64, 32768, 8192, "wide"),
    "sft": Stage((2e-6, 1e-5, 1e-5), 1792, 16384, 5_000, 64, 32768, 8192, "slight"),
}
# `nano` begins with nothing, so that its encoder learns from the first stage on; rates fall to the end only in the last stage
NANO = {
    "alignment": Stage((1e-3,) * 3, 140, 256, 1_000, 6, 160, 112, final_fraction=0.5),
    "joint": Stage((1e-3,) * 3, 140, 256, 3_500, 6, 160, 112, final_fraction=0.5),
    "multi-task": Stage((1e-3,) * 3, 140, 512, 8_000, 3, 320, 256, final_fraction=0.5),
    "print": Stage((1e-3,) * 3, 280, 1024, 6_000, 2, 960, 288, final_fraction=0.5),
    "look-up": Stage((7e-4,) * 3, 280, 2048, 1_500, 1, 1800, 640, final_fraction=0.5),
    "sft": Stage((7e-4,) * 3, 280, 2048, 6_000, 1, 1800, 640),
}
REAL = "out/real"  # folder of `andesvl prepare real`
_READING = {"word": 1.0, "number": 1.0, "handwritten": 1.0}
_RENDERED = {"shapes": 3.0, "word": 1.0, "number": 0.5, "handwritten": 1.0, "chart": 1.0, "screen": 1.0}
_REAL = {"emoji": 0.7, "icons": 0.4, "flags": 0.4, "stamps": 0.5, "maps": 0.6, "ocr": 0.5, "charts": 0.4}
_TEXT = {
    "niah_single": 0.5, "niah_multikey": 0.2, "niah_multivalue": 0.15, "vt": 0.15, "cwe": 0.05, "fwe": 0.05, "qa_two_hop": 0.15,
    "dialogue": 0.15,
}  # fmt: skip


def _long(tokens: int, share: float = 1.0) -> dict[str, float]:
    return {f"{family}@{tokens}": share * weight for family, weight in _TEXT.items()}


def _real(share: float) -> dict[str, float]:
    return {source: share * weight for source, weight in _REAL.items()}


NANO_DATA = {
    "alignment": _READING,
    "joint": _RENDERED | _REAL | _long(256),
    # what binds a question to a place: few things with all that can be asked of them, lists, look-ups that a guess often hits
    "multi-task": _RENDERED | {"pair": 5.0, "shapes": 2.0, "widget": 2.5} | _real(0.3)
    | {"echo@128": 0.7, "niah_single@112": 1.2, "niah_single@192": 1.2},
    "print": _RENDERED | {"lines": 4.0, "page": 1.0, "shapes": 0.5, "word": 0.3, "number": 0.2, "handwritten": 0.5, "chart": 0.3}
    | {"screen": 0.4, "pair": 0.15, "widget": 0.1, "niah_single@192": 0.12, "niah_single@512": 0.06, "echo@128": 0.08}
    | {"recite@128": 0.08, "niah_multikey@256": 0.04, "qa_two_hop@256": 0.06},
    "look-up": {"gui": 5.0, "lines": 0.6, "page": 0.6, "shapes": 0.5, "word": 0.1, "number": 0.1, "handwritten": 0.4}
    | {"chart": 0.2, "screen": 0.3, "pair": 0.2, "widget": 0.3, "niah_single@512": 0.06, "echo@128": 0.03},
    "sft": _RENDERED | {"lines": 1.5, "page": 1.5, "gui": 5.0, "shapes": 1.0, "word": 0.4, "number": 0.2, "handwritten": 1.5}
    | {"chart": 0.5, "screen": 0.8, "pair": 0.25, "widget": 0.25} | _real(0.15) | _long(256, 0.2) | {"qa_two_hop@256": 0.1}
    | {"echo@128": 0.05, "recite@128": 0.05, "niah_single@192": 0.1, "niah_single@512": 0.1, "niah_single@2048": 0.12},
}  # fmt: skip
NANO_STEPS = {
    "nano": {name: stage.steps for name, stage in NANO.items()},
    "nano-siglip": {"alignment": 500, "joint": 1_500, "multi-task": 4_500, "print": 1_500, "look-up": 1_000, "sft": 1_200},
}
RAMPS = {  # examples of a family over which its pictures fill up
    "joint": dict.fromkeys(TASKS, 4_000), "multi-task": dict.fromkeys(TASKS, 2_500), "print": {"lines": 100_000, "page": 24_000},
}  # fmt: skip


def released(model: str, stage: Stage) -> TrainConfig:
    """A stage of a released size: bfloat16 over float32 parameters, layers recomputed, everything spread over all devices."""
    return TrainConfig(
        model=CONFIGS[model].replace(dtype="bfloat16", remat="layer"), mesh="fsdp=-1", data=Mixture(resize=stage.resize),
        budget=_budget(stage), max_size=stage.max_size,
        optimizer=_optimizer(stage, warmup_steps=stage.steps // 50, weight_decay=0.05, clip_norm=1.0), steps=stage.steps,
    )  # fmt: skip


def nano(model: str, name: str) -> TrainConfig:
    """A stage of a model that ships, see experiments/nano.py."""
    stage, weights = replace(NANO[name], steps=NANO_STEPS[model][name]), NANO_DATA[name]
    files = {source: f"{REAL}/{source}/train.tar" for source in weights if source in (*_REAL, "gui")}
    ramps = {family: examples for family, examples in RAMPS.get(name, {}).items() if family in weights}
    return TrainConfig(
        model=CONFIGS[model], budget=_budget(stage), max_size=stage.max_size, min_tokens=1,
        data=Mixture(weights, files=files, ramps=ramps, seed=list(NANO).index(name)),
        loss_average="square", optimizer=_optimizer(stage, warmup_steps=40), steps=stage.steps, checkpoint_every=500,
    )  # fmt: skip


def _budget(stage: Stage) -> Budget:
    return Budget(stage.rows, stage.tokens, stage.patches, stage.targets)


def _optimizer(stage: Stage, **options) -> Optimizer:
    rates = dict(zip(PARTS, stage.rates, strict=True))
    return replace(Optimizer(**rates), final_fraction=stage.final_fraction, **options)


ALL = {f"{model}/{name}": nano(model, name) for model in NANO_STEPS for name in NANO} | {
    f"{model}/{name}": released(model, stage)
    for model in CONFIGS
    if model.startswith("andesvl")
    for name, stage in RELEASED.items()
}


def get_config(name: str) -> TrainConfig:
    return named_config(ALL, name, __file__)


def table() -> str:
    """One line per stage; the released sizes share theirs."""
    head = ("model", "stage", "trained", "peak rates: encoder, projector, decoder", "largest picture", "tokens of a row",
            "patches of a row", "rows", "steps")  # fmt: skip
    lines = []
    models = {"nano": ("nano", NANO), "nano-siglip": ("nano-siglip", NANO), "0.6B, 1B, 2B, 4B": ("andesvl-1b", RELEASED)}
    for model, (example, stages) in models.items():
        for name, stage in stages.items():
            config = ALL[f"{example}/{name}"]
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
