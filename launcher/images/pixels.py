"""Turns an opened image into what the model sees: 8-bit RGB, cropped to the centre.

Training, validation, exports and the check of the images use these functions, and the model card quotes their text for
people who have nothing but Pillow and numpy. So each stands alone: it imports what it needs and uses
nothing but the others.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

WHITE = (255, 255, 255)
NOT_FINITE = "holds values that are NaN or infinite"


def to_rgb(image: PillowImage, background: Any = WHITE, grey_range: Any = None) -> PillowImage:
    """Turn an image just opened upright, composite what is transparent on ``background``, and give RGB of 8 bits."""
    from PIL import Image, ImageOps

    depth, key = grey_depth(image), transparent_value(image)
    upright = ImageOps.exif_transpose(image)
    if depth:
        upright = scale_grey(upright, depth, key, grey_range)
    elif key is not None:
        upright.info["transparency"] = key
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    canvas = Image.new("RGBA", upright.size, (*background, 255))
    canvas.alpha_composite(upright.convert("RGBA"))
    return canvas.convert("RGB")


def raw_mode(image: PillowImage) -> str:
    """How the file holds its pixels, in Pillow's words; known only before they are loaded."""
    tiles: list[Any] = getattr(image, "tile", [])
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def grey_depth(image: PillowImage) -> str:
    """Which grey of more than 8 bits an image has: 16 bits, floats, integers (32 bits, or with a sign), or ""."""
    if image.mode == "I":
        return "16 bits" if image.format in ("PNG", "PPM") else "integers"
    return "16 bits" if image.mode.startswith("I;16") else "floats" if image.mode == "F" else ""


def transparent_value(image: PillowImage) -> Any:
    """The one grey or colour that a file without alpha calls transparent, as the pixels will have it; None: none."""
    key, raw = image.info.get("transparency"), raw_mode(image)
    if isinstance(key, tuple) and ";16" in raw:
        return tuple(value >> 8 for value in key)
    factor = {"L;2": 85, "L;4": 17}.get(raw, 1)
    return key * factor if isinstance(key, int) and image.mode != "P" else key


def scale_grey(image: PillowImage, depth: str, key: Any, grey_range: Any) -> PillowImage:
    """Scale ``grey_range`` to 0 to 255; None: 0 to 65535 of 16 bits, 0 to 1 of floats. ``key`` becomes transparent."""
    import numpy as np
    from PIL import Image

    problem = range_problem(depth, *extremes(image), grey_range)
    if problem:
        raise ValueError(problem)
    low, high = grey_range or ((0, 1) if depth == "floats" else (0, 65535))
    values = np.asarray(image).astype(np.float64)
    grey = Image.fromarray(((values - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8))
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def extremes(image: PillowImage) -> tuple[float, float]:
    """The lowest and the highest value of deep grey."""
    import numpy as np

    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError(NOT_FINITE)
    return float(values.min()), float(values.max())


def range_problem(depth: str, lowest: float, highest: float, grey_range: Any) -> str:
    """Why the values of an image cannot be scaled, or ""; ``grey_range`` None: by the rule of its kind."""
    seen = f"{depth} from {lowest:g} to {highest:g}"
    if grey_range is not None or (lowest == 0 and highest == 0):
        return ""
    if depth == "integers":
        return f"{seen}; nothing says which of them are black and white"
    if depth == "floats" and (lowest < -1 / 255 or highest > 1 + 1 / 255):
        return f"{seen}; 0 is black and 1 is white where nothing else is said"
    return ""


def centre_crop(image: PillowImage, resize_size: int, image_size: int, interpolation: str) -> PillowImage:
    """The centre of the image with its short side resized to ``resize_size``; the rest of it is never computed."""
    from PIL import Image

    resized = [int(resize_size * side / min(image.size)) for side in image.size]
    starts = [round((side - image_size) / 2) for side in resized]
    scales = [side / new for side, new in zip(image.size, resized, strict=True)]
    left, top = (start * scale for start, scale in zip(starts, scales, strict=True))
    right, bottom = ((start + image_size) * scale for start, scale in zip(starts, scales, strict=True))
    method, (width, height) = Image.Resampling[interpolation.upper()], image.size
    # First all rows, then all columns, as training does: in between, values are rounded and cut off.
    columns = image.resize((image_size, height), method, box=(left, 0, min(right, width), height))
    return columns.resize((image_size, image_size), method, box=(0, top, image_size, min(bottom, height)))


SHARED = (to_rgb, raw_mode, grey_depth, transparent_value, scale_grey, extremes, range_problem, centre_crop)


def source() -> str:
    """The code that the model card quotes: Python that needs only Pillow and numpy."""
    texts = "\n\n".join(inspect.getsource(function) for function in SHARED)
    return f"WHITE = {WHITE}\nNOT_FINITE = {NOT_FINITE!r}\n\n\n{texts}"


def describe(facts: dict[str, Any]) -> str:
    """The preprocessing in words, by the values that exports carry; exports of earlier versions lack some."""
    colour = "#{:02x}{:02x}{:02x}".format(*facts.get("background", WHITE))
    if facts.get("grey_range"):
        deep = "{:g} to {:g} become 0 to 255, and what is beyond is cut off".format(*facts["grey_range"])
    else:
        deep = "0 to 65535 of 16 bits and 0 to 1 of floats become 0 to 255, and other ranges are refused"
    size = facts["image_size"]
    of_all = ", in all three channels" if len(facts["mean"]) > 1 else ""
    grey = f", it is made grey (Pillow's L{of_all})" if facts.get("channels") == 1 else ""
    return (
        "An image (of an animation, the first frame) is turned upright as its EXIF orientation says, composited on "
        f"{colour} where it is transparent, and turned into RGB of 8 bits. Of grey with more than 8 bits, {deep}; of "
        f"colours with 16 bits the upper 8 count. The short side is resized to {facts['resize_size']} "
        f"({facts['interpolation']}, antialiased), the centre {size} x {size} cut out{grey}, its values divided by "
        f"255, then normalised with the mean {facts['mean']} and the standard deviation {facts['std']}."
    )
