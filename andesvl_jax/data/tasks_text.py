"""Reading: short words in spaced capitals, and numbers, in several fonts, sizes, colours and slants.

One character stands on each visual token: what a model of minutes can learn to read. Running text is for longer training.

About half of the words are English, the rest random letters, so that the reader has to read rather than guess.
The content is the string itself whatever its looks; of a single character, the character with its font.
"""

import numpy as np
from PIL import Image

from andesvl_jax.data.drawing import FONTS, TOKEN_SIDE, background, contrasting, pixels, side, stamp, text_mask, turned
from andesvl_jax.data.examples import Example, Turn, draw_in_split, pick

WORD_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
WORDINGS = {
    "word": (
        "What does it say?",
        "Read the word.",
        "Which letters are written here?",
        "What is written in the picture?",
        "Write down the text.",
        "What word is this?",
    ),
    "number": (
        "Which number is this?",
        "Read the number.",
        "What number is written here?",
        "Which digits are printed?",
        "Write down the number.",
        "What number do you see?",
    ),
}
ENGLISH = (
    "AM AN AS AT BE BY DO GO HE IF IN IS IT ME MY NO OF ON OR SO TO UP US WE "
    "ACT ADD AGE AIR ALL AND ANT ANY APE ARM ART ASK BAD BAG BAR BAT BED BEE BIG BIT BOX BOY BUS BUY CAN CAP CAR CAT COW "
    "CRY CUP CUT DAY DIG DOG DRY DUE EAR EAT EGG END EYE FAN FAR FAT FIG FIN FIT FIX FLY FOR FOX FUN GAP GAS GET GUN HAT "
    "HEN HER HIM HIP HIT HOT ICE INK JAM JAR JET JOB JOY KEY KID KIT LAW LEG LET LID LIP LOG LOW MAN MAP MIX MUD NET NEW "
    "NOD NUT OAK OIL OLD ONE OUT OWL PAN PAY PEN PET PIG PIN POT PUT RAT RED ROD ROW RUN SAD SEA SIT SKY SUN TAX TEN TOP "
    "TOY TWO USE VAN VET WAR WAX WAY WEB WET WHY WIN YES ZIP ZOO "
    "ABLE AREA BABY BACK BALL BANK BIRD BLUE BOAT BOOK CAKE CITY COLD DARK DEEP DOOR DUCK EASY FACE FARM FISH FIVE FOUR "
    "GAME GIRL GOLD HAND HOME JUMP KING LAKE LION MILK MOON NINE OPEN PARK QUIZ RAIN ROAD SHIP SNOW TREE VERY WIND ZERO"
).split()
SIZES = (23, 25, 27)  # pixels per em: capitals of 17 to 20 pixels
WIDEST_CHARACTER = TOKEN_SIDE - 4  # pixels
SLANT = 6  # degrees either way
JITTER = 1  # pixels that a character may stand off the middle of its place


def draw_word(rng: np.random.Generator) -> tuple[str, str]:
    """(text, font): half English words, a third random strings of 2 to 4 letters, the rest single letters."""
    kind = rng.random()
    font = pick(rng, FONTS)
    if kind < 0.5:
        return pick(rng, ENGLISH), font
    length = int(rng.integers(2, 5)) if kind < 0.85 else 1
    return "".join(WORD_ALPHABET[letter] for letter in rng.integers(len(WORD_ALPHABET), size=length).tolist()), font


def draw_number(rng: np.random.Generator) -> tuple[str, str]:
    """(digits, font): 1 to 4 digits without a leading zero, longer ones more often."""
    length = pick(rng, (1, 2, 2, 3, 3, 4, 4))
    lowest = 10 ** (length - 1) if length > 1 else 0
    return str(int(rng.integers(lowest, 10**length))), pick(rng, FONTS)


def describe(drawn: tuple[str, str]) -> str:
    """Canonical content: there are too few single characters to split them by character alone."""
    text, font = drawn
    return f"text {text}" if len(text) > 1 else f"text {text} in {font}"


def character_mask(character: str, font: str, size: int, degrees: float) -> Image.Image:
    """One slanted character that fits its place; the next smaller sizes where it does not."""
    for smaller in range(size, 0, -2):
        mask = turned(text_mask(character, font, smaller), degrees)
        if max(mask.size) <= WIDEST_CHARACTER:
            return mask
    raise ValueError(f"font {font} draws {character!r} wider than {WIDEST_CHARACTER} pixels at every size")


def text_picture(rng: np.random.Generator, text: str, font: str) -> np.ndarray:
    """uint8 [27, 28 max(n, 2) - 1, 3]: n characters in one font, size and slant on a background that contrasts with them."""
    size = pick(rng, SIZES)
    degrees = float(rng.integers(-SLANT, SLANT + 1)) if rng.random() < 0.5 else 0.0
    paper, ink = contrasting(rng)
    places = max(2, len(text))
    first = int(rng.integers(places - len(text) + 1))
    image = background(rng, side(places), side(1), paper)
    shifts = rng.integers(-JITTER, JITTER + 1, (len(text), 2)).tolist()
    for place, (character, shift) in enumerate(zip(text, shifts, strict=True)):
        mask = character_mask(character, font, size, degrees)
        x = TOKEN_SIDE * (first + place) + (TOKEN_SIDE - 1 - mask.width) // 2 + shift[0]
        stamp(image, mask, ink, x, (TOKEN_SIDE - 1 - mask.height) // 2 + shift[1])
    return pixels(image)


def render_word(rng: np.random.Generator, split: str, crowd: int) -> Example:
    """A word of 1 to 4 capitals to read."""
    (text, font), content = draw_in_split(draw_word, describe, rng, split)
    turn = Turn("word", pick(rng, WORDINGS["word"]), text)
    return Example((text_picture(rng, text, font),), (turn,), content)


def render_number(rng: np.random.Generator, split: str, crowd: int) -> Example:
    """A printed number of 1 to 4 digits to read."""
    (text, font), content = draw_in_split(draw_number, describe, rng, split)
    turn = Turn("number", pick(rng, WORDINGS["number"]), text)
    return Example((text_picture(rng, text, font),), (turn,), content)
