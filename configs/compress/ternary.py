"""Ternary matrices of the decoder in groups of 32, the rest in 8 bits; round to nearest, which a trained model does not survive.

    andesvl compress --model nano --recipe configs/compress/ternary.py --out out/nano-ternary

It shows the format. Ternary weights need training: quantization-aware, or a distillation.
"""

from andesvl_jax.weights import DECODER_MATRICES, Int8, Quantize, Recipe, Rule, Ternary


def get_recipe() -> Recipe:
    return Recipe(
        (
            Rule(DECODER_MATRICES, Quantize(Ternary(32))),
            Rule(r"vision\.layers\.(qkv|proj|fc1|fc2|fc3)|projector\.(fc1|fc2)", Quantize(Int8())),
            Rule(r"decoder\.(embedding|head)", Quantize(Int8(), axis=-1)),
        )
    )
