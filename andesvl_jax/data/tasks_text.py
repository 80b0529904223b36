"""Reading: short words in capitals, and numbers, in several fonts, colours and slants.

About half of the words are English, the rest random letters, so that the reader has to read rather than guess.
The content is the string itself whatever its looks; of a single character, the character with its font.
"""

import numpy as np

from andesvl_jax.data.drawing import FONTS, background, contrasting, pixels, side, stamp, text_mask, turned
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
SIZES = (20, 22, 24, 26, 28)  # pixels per em: capitals of 14 to 21 pixels
WIDEST, HIGHEST = side(5), side(2)
SLANT = 8.0  # degrees either way
BORDER = 2  # pixels


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


def offset(rng: np.random.Generator, room: int) -> int:
    """A place for text that leaves `room` pixels free, BORDER of them on each side where there are as many."""
    border = min(BORDER, room // 2)
    return int(rng.integers(border, room - border + 1))


def text_picture(rng: np.random.Generator, text: str, font: str) -> np.ndarray:
    """uint8 [27 or 55, 55..139, 3]: the text slightly slanted on a background that contrasts with it."""
    degrees = float(rng.uniform(-SLANT, SLANT)) if rng.random() < 0.6 else 0.0
    mask = turned(text_mask(text, font, pick(rng, SIZES)), degrees)
    if mask.width > WIDEST - 2 * BORDER:
        mask = turned(text_mask(text, font, SIZES[0]), degrees)
    columns = max(2, -(-(mask.width + 2 * BORDER + 1) // 28))
    width = min(WIDEST, side(columns + int(rng.random() < 0.2)))
    height = side(1) if mask.height + BORDER < side(1) and rng.random() < 0.7 else HIGHEST
    paper, ink = contrasting(rng)
    image = background(rng, width, height, paper)
    stamp(image, mask, ink, offset(rng, width - mask.width), offset(rng, height - mask.height))
    return pixels(image)


def render_word(rng: np.random.Generator, split: str) -> Example:
    """A word of 1 to 4 capitals to read."""
    (text, font), content = draw_in_split(draw_word, describe, rng, split)
    turn = Turn("word", pick(rng, WORDINGS["word"]), text)
    return Example((text_picture(rng, text, font),), (turn,), content)


def render_number(rng: np.random.Generator, split: str) -> Example:
    """A printed number of 1 to 4 digits to read."""
    (text, font), content = draw_in_split(draw_number, describe, rng, split)
    turn = Turn("number", pick(rng, WORDINGS["number"]), text)
    return Example((text_picture(rng, text, font),), (turn,), content)
