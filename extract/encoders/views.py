"""Views of a picture: mirrored, or cropped elsewhere than an encoder does by itself.

Embeddings are averaged over several views at evaluation (Krizhevsky, Sutskever and Hinton 2012, section 4.1).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from PIL import Image, ImageOps

from sail_align.extract.encoders.preprocessing import ImagePreprocessing

CROP = 0.875
"""Side of a corner crop as a share of the picture's short side: 224 of 256 pixels."""

Resize = Callable[[Image.Image], Image.Image]
"""A function that makes a picture the input of an encoder, before normalisation."""


@dataclass(frozen=True)
class View:
    """One view of a picture.

    Attributes:
        name: Name for stores of features.
        place: Where a square is cropped, as shares of the free width and height from the upper left corner. None is the
            encoder's own crop.
        side: Side of that square as a share of the picture's short side.
        mirrored: Whether left and right are exchanged.
    """

    name: str
    place: tuple[float, float] | None = None
    side: float = 1.0
    mirrored: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the view as a store records it. JSON has no tuples."""
        return {**asdict(self), "place": self.place and list(self.place)}

    def resize(self, own: Resize, preprocessing: ImagePreprocessing) -> Resize:
        """Return the function that makes this view of a picture, given the encoder's own and its preprocessing."""

        def resize(image: Image.Image) -> Image.Image:
            view = own(image) if self.place is None else self._crop(image, preprocessing)
            return ImageOps.mirror(view) if self.mirrored else view

        return resize

    def _crop(self, image: Image.Image, preprocessing: ImagePreprocessing) -> Image.Image:
        side = self.side * min(image.size)
        left, top = (share * (length - side) for share, length in zip(self.place or (), image.size, strict=True))
        resampling = Image.Resampling[preprocessing.interpolation.upper()]
        size = (preprocessing.crop, preprocessing.crop)
        return image.resize(size, resampling, box=(left, top, left + side, top + side))


OWN, MIRRORED = View("own"), View("mirrored", mirrored=True)
_CORNERS = tuple(
    View(f"{row}-{column}{'-mirrored' * mirrored}", (x, y), CROP, bool(mirrored))
    for mirrored, (y, row), (x, column) in product(
        (0, 1), ((0.0, "top"), (1.0, "bottom")), ((0.0, "left"), (1.0, "right"))
    )
)
_ENDS = (View("first-square", (0.0, 0.0)), View("last-square", (1.0, 1.0)))

VIEWS: dict[str, tuple[View, ...]] = {
    "flip": (OWN, MIRRORED),
    "3-crop": (OWN, *_ENDS),
    "5-crop": (OWN, *_CORNERS[:4]),
    "10-crop": (OWN, MIRRORED, *_CORNERS),
}
"""Views to average. The first is always the encoder's own crop. `3-crop` adds the squares at both ends of a picture."""
