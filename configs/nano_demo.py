"""The training run of `andesvl demo`: `nano` from nothing on rendered tasks and handwritten digits, minutes on a laptop CPU.

Needs a tokenizer.json in the run directory (the demo trains one). Command:

    andesvl train --config configs/nano_demo.py --out out/nano_demo --set tokenizer=out/demo/model
"""

from andesvl_jax.demo import TRAINING


def get_config():
    return TRAINING
