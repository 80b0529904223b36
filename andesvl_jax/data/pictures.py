"""Pictures that stand inside a data file as bytes."""

import base64
import binascii
import io

from PIL import Image

from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import FORMATS, open_image

MAX_PICTURE_BYTES = 64 << 20  # of one encoded picture; its pixels are bounded by `inputs.image`


def decode_picture(data: bytes, where: str) -> Image.Image:
    """An encoded picture as RGB. Raises UserError, which begins with `where`, for damaged or oversized ones, before decoding."""
    if len(data) > MAX_PICTURE_BYTES:
        raise UserError(f"{where} has {len(data):,} bytes, expected at most {MAX_PICTURE_BYTES:,}.")
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow's header parsers raise many types on damaged files, and refuse the largest pictures
        raise UserError(f"{where} cannot be opened as an image; expected {', '.join(FORMATS)} below Pillow's limit.") from error
    try:
        return open_image(opened)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def decode_base64(text: str, where: str) -> Image.Image:
    """A picture in base64, with or without line breaks and padding. Raises UserError as `decode_picture` does."""
    if len(text) > MAX_PICTURE_BYTES * 4 // 3:
        raise UserError(f"{where} has {len(text):,} characters, expected at most {MAX_PICTURE_BYTES * 4 // 3:,}.")
    text = "".join(text.split()).rstrip("=")
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where} is no base64 ({error}), expected an encoded picture.") from error
    return decode_picture(data, where)
