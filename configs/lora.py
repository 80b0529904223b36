"""Fine-tuning with LoRA adapters: the base stays as it is, and a run writes a PEFT directory of a few hundred kilobytes.

Commands:

    andesvl train --config configs/lora.py:nano --out out/mine --set "data.files={'mine': 'pictures/data.json'}" \
        --set "data.weights={'mine': 1.0}"
    andesvl chat --model nano --adapter out/mine/adapter --image pictures/1.png "What is this?"

`nano/all` adapts the encoder too, for pictures unlike those that nano was trained on. Ranks, alpha and rates by --set, e.g.
adapters.decoder=16, adapters.rank_stabilized=True, optimizer.decoder=1e-3.
"""

from dataclasses import replace

from andesvl_jax.config import CONFIGS
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.training.config import Adapters, Optimizer, TrainConfig, named_config

NANO = TrainConfig(
    model=CONFIGS["nano"],
    init_from="nano",
    adapters=Adapters(projector=8, decoder=8, alpha=16.0),
    optimizer=Optimizer(vision=0.0, projector=2e-3, decoder=2e-3, warmup_steps=10, weight_decay=0.0),
    budget=Budget(rows=1, tokens=512, patches=1600, targets=256),
    max_size=280,
    min_tokens=1,
    steps=120,
    log_every=10,
    checkpoint_every=60,
)
CONFIGURATIONS = {
    "nano": NANO,
    "nano/all": replace(
        NANO,
        adapters=Adapters(vision=8, projector=8, decoder=8, alpha=16.0),
        optimizer=replace(NANO.optimizer, vision=1e-3),
    ),
}


def get_config(name: str) -> TrainConfig:
    return named_config(CONFIGURATIONS, name, "configs/lora.py")
