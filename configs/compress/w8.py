"""8 bits a weight, one scale per output channel, embedding and head included; round to nearest.

andesvl compress --model nano --recipe configs/compress/w8.py --out out/nano-w8
"""

from andesvl_jax.weights import ALL_MATRICES, Int8, Quantize, Recipe, Rule


def get_recipe() -> Recipe:
    return Recipe(
        (
            Rule(ALL_MATRICES, Quantize(Int8())),
            Rule(r"decoder\.(embedding|head)", Quantize(Int8(), axis=-1)),
        )
    )
