"""Training of 1B and 4B on TPU slices; docs/tpu.md tells what `andesvl aot` finds for each shape.

Commands:

    andesvl aot   --config configs/tpu.py:andesvl-4b/v5e-64/4096 --topology v5e:8x8
    andesvl train --config configs/tpu.py:andesvl-4b/v5e-64/4096 --out out/4b --set init_from=DIR
    python benchmarks/tpu.py > docs/tpu.md

Rates are those of configs/stages.py's multi-task stage; this project's own.
"""

from andesvl_jax.config import CONFIGS
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.training.config import Optimizer, TrainConfig, named_config

TOPOLOGIES = {"v5e-16": "v5e:4x4", "v5e-64": "v5e:8x8", "v5e-256": "v5e:16x16", "v6e-64": "v6e:8x8"}
MESHES = {  # weights travel between as few chips as hold the state, rows go everywhere
    "andesvl-1b": {"v5e-16": "fsdp=16", "v5e-64": "data=4,fsdp=16", "v5e-256": "data=16,fsdp=16", "v6e-64": "data=4,fsdp=16"},
    "andesvl-4b": {"v5e-16": "fsdp=16", "v5e-64": "fsdp=64", "v5e-256": "data=4,fsdp=64", "v6e-64": "data=4,fsdp=16"},
}
# Four chips share a row of 16,384 tokens, a quarter of it visual: a row each, half of it visual, takes 17.5 GiB on v5e-16.
LONG_4B = {"v5e-16": "fsdp=4,tensor=4", "v5e-64": "fsdp=16,tensor=4", "v5e-256": "data=4,fsdp=16,tensor=4"}
TOKENS = (4096, 16384)  # of a row


def chips(slice_name: str) -> int:
    return int(slice_name.partition("-")[2])


def config(model: str, slice_name: str, tokens: int) -> TrainConfig:
    mesh, rows, patches = MESHES[model][slice_name], chips(slice_name), 2 * tokens
    if (model, tokens) == ("andesvl-4b", 16384) and slice_name in LONG_4B:
        mesh, rows, patches = LONG_4B[slice_name], rows // 4, tokens
    return TrainConfig(
        model=CONFIGS[model].replace(dtype="bfloat16", remat="layer"), mesh=mesh, max_size=1792,
        budget=Budget(rows, tokens, patches, targets=tokens // 2), steps=10_000,
        optimizer=Optimizer(vision=1e-5, projector=5e-5, decoder=5e-5, warmup_steps=200, clip_norm=1.0),
    )  # fmt: skip


ALL = {
    f"{model}/{slice_name}/{tokens}": config(model, slice_name, tokens)
    for model in MESHES for slice_name in TOPOLOGIES for tokens in TOKENS
}  # fmt: skip


def get_config(name: str) -> TrainConfig:
    return named_config(ALL, name, __file__)
