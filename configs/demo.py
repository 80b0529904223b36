"""The first stage of `andesvl demo`: `pico`, 2.3 M parameters, learns to read rendered words in a minute on a laptop CPU.

Command:

    andesvl train --config configs/demo.py --out out/words --set tokenizer=out/demo/model
"""

from andesvl_jax.demo import STAGES


def get_config():
    return STAGES["words"]
