"""The first stage of `andesvl demo`: `nano` learns from nothing to read rendered words, in under a minute on a laptop CPU.

Command:

    andesvl train --config configs/nano_demo.py --out out/words --set tokenizer=out/demo/model
"""

from andesvl_jax.demo import STAGES


def get_config():
    return STAGES["words"]
