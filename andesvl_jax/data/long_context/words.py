"""Words of the long-context tasks: common ones, which a byte-level BPE of 4,096 entries writes in one to three tokens.

Words that questions ask for (NOUNS, people, CITIES) never stand in filler sentences, so that an answer cannot occur by chance.
"""

from collections.abc import Callable, Container

import numpy as np

from andesvl_jax.data.examples import pick

FIRST_NAMES = (
    "Adam Alice Anna Ben Bob Carl Clara Dora Ella Emma Eva Finn Gina Hugo Ina Iris Ivan Jack Jane Kate Lena Leo Lisa Mark Mary "
    "Max Nina Nora Otto Paul Peter Rosa Ruth Sam Simon Tina Tom Vera"
).split()
LAST_NAMES = (
    "Baker Bell Black Brown Carter Cook Cooper Field Fisher Fox Gray Green Hill Hunter King Lake Marsh Mason Miller North "
    "Page Park Porter Price Reed Rose Snow Stone Turner Ward West White Winter Wood Woods Young"
).split()
CITIES = (
    "Austin Bath Berlin Bern Bonn Boston Cairo Dallas Denver Dublin Leeds Lima Lyon Madrid Milan Oslo Paris Perth Riga Rome "
    "Seoul Sofia Turin York"
).split()
NOUNS = (
    "arrow ball band bank barn basket beach bean bear bell bird boat bone book box branch bread brick bridge brush bucket button "
    "cable cake camera candle card cat chair chain circle clock cloud coat coin corner cow cup desk dish dog door drum duck "
    "engine farm fence field finger fish flag floor flower forest fork frame garden gate glass gold guitar hall hammer hand hat "
    "hill honey horse hotel house island key lake lamp leaf letter lion lock map market mirror moon mouse needle nest office "
    "onion orange paper pencil pillow pipe planet plate pocket pond rice ring river road rock roof room rope rose salt sand "
    "school sea shell ship shirt shoe silver sock spoon spring square star station stone storm street sugar table tank tea tent "
    "ticket tiger tool tower town train tray tree truck wall wheel window wing wire wolf wood wool yard"
).split()
THINGS = (
    "ball basket bell bone book box bread brush bucket button cable cake camera candle card chain chair clock coat coin cup desk "
    "dish drum flag flower fork frame glass guitar hammer hat honey key lamp letter lock map mirror needle onion orange paper "
    "pencil pillow pipe plate rice ring rope rose salt shell shirt shoe sock spoon stone sugar table tea tent ticket tool tray "
    "wheel wire wood wool"
).split()  # of NOUNS, those that one can carry
_SUBJECTS = (
    "The sky", "The air", "The rain", "The night", "The day", "The morning", "The evening", "The weather", "The light",
    "The shade", "The noise", "The week", "The summer", "The story", "The song", "The view", "The way home", "The music",
)  # fmt: skip
_STATES = (
    "bright", "clear", "cold", "dark", "dry", "fine", "good", "grey", "hot", "late", "long", "new", "nice", "old", "quiet",
    "short", "slow", "strange", "warm", "wet",
)  # fmt: skip


def noise(rng: np.random.Generator) -> str:
    """A sentence that no question is about: "The evening was warm."."""
    return f"{pick(rng, _SUBJECTS)} {pick(rng, ('is', 'was'))} {pick(rng, _STATES)}."


def number(rng: np.random.Generator) -> str:
    """Four digits, the first not 0."""
    return str(int(rng.integers(1000, 10_000)))


def person(rng: np.random.Generator) -> str:
    return f"{pick(rng, FIRST_NAMES)} {pick(rng, LAST_NAMES)}"


def noun(rng: np.random.Generator) -> str:
    return pick(rng, NOUNS)


def carried(rng: np.random.Generator) -> str:
    return pick(rng, THINGS)


def two_nouns(rng: np.random.Generator) -> str:
    return f"{noun(rng)} {noun(rng)}"


def unused(draw: Callable[[np.random.Generator], str], rng: np.random.Generator, *taken: Container[str]) -> str:
    """The first word of `draw(rng)` that none of `taken` holds."""
    while True:
        word = draw(rng)
        if not any(word in words for words in taken):
            return word
