"""4 bits a weight in groups of 32, embedding and head in 8 bits; round to nearest.

    andesvl compress --model nano --recipe configs/compress/w4.py --out out/nano-w4

The encoder's fc2 has groups of 16: nano's mlp width, 528, is no multiple of 32.
"""

from andesvl_jax.weights import DECODER_MATRICES, Int4, Int8, Quantize, Recipe, Rule


def get_recipe() -> Recipe:
    return Recipe(
        (
            Rule(DECODER_MATRICES, Quantize(Int4(32))),
            Rule(r"vision\.layers\.(qkv|proj|fc1|fc3)|projector\.(fc1|fc2)", Quantize(Int4(32))),
            Rule(r"vision\.layers\.fc2", Quantize(Int4(16))),
            Rule(r"decoder\.(embedding|head)", Quantize(Int8(), axis=-1)),
        )
    )
