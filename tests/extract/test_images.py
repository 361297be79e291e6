"""Pictures as they are found on the web: which are read, as what, and what becomes of the rest."""

import random
import struct
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import pytest
from fakes import FakeVision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from sail_align.extract.data import Status, UnreadableImageError
from sail_align.extract.encoders.preprocessing import ImagePreprocessing
from sail_align.extract.executor.encode import encode_images
from sail_align.extract.sources.class_folder import ClassFolderConfig
from sail_align.extract.sources.images import PIXEL_LIMIT, FolderSource, read_image, upright_rgb

# Pillow warns of what it mends in damaged files.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

PHOTOS = Path(__file__).parents[2] / "../shared/data"
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # its top is on the right


def photo(width: int = 64, height: int = 48) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format_: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


JPEG = encoded(photo(), "JPEG", quality=90)


def difference(image: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference in levels of 255."""
    return float(np.abs(np.asarray(image, dtype=float) - np.asarray(other, dtype=float)).mean())


@pytest.mark.slow
def test_shard_with_unreadable_images(tmp_path):
    folder = tmp_path / "all" / "one"
    folder.mkdir(parents=True)
    files = {
        "animated.gif": encoded(photo(), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 48))] * 2),
        "animated.webp": encoded(photo(), "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 48))] * 2),
        "bomb.png": encoded(Image.new("1", (12_000, 12_000)), "PNG"),
        "cmyk.jpg": encoded(photo().convert("CMYK"), "JPEG"),
        "deep.png": encoded(Image.fromarray(np.full((48, 64), 40_000, dtype=np.uint16)), "PNG"),
        "empty.jpg": b"",
        "good.jpg": JPEG,
        "narrow.png": encoded(photo(1, 10_000), "PNG"),
        "page.jpg": b"<!doctype html><title>404</title>",
        "palette.png": encoded(photo().quantize(8), "PNG", transparency=0),
        "png-inside.jpg": encoded(photo(), "PNG"),
        "truncated.jpg": JPEG[: len(JPEG) // 2],
        "turned.jpg": encoded(photo(), "JPEG", exif=TURNED),
        "wide.png": encoded(photo(20_000, 2), "PNG"),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    source = ClassFolderConfig(kind="class-folder", root="all").open(tmp_path)
    samples = list(source.samples())
    ((features, status),) = encode_images(samples, source, FakeVision(), 2, lambda rows: None)
    found = {sample.key.removeprefix("one/"): Status(value) for sample, value in zip(samples, status, strict=True)}
    bad = {
        "bomb.png": Status.TOO_LARGE,
        "empty.jpg": Status.UNDECODABLE,
        "page.jpg": Status.UNDECODABLE,
        "truncated.jpg": Status.UNDECODABLE,
    }
    assert found == {name: bad.get(name, Status.OK) for name in files}
    assert np.isfinite(features).all(axis=1).tolist() == (status == Status.OK).tolist()


@pytest.mark.parametrize("name", ["none.jpg", "good.jpg/other.jpg", "x" * 5_000, "null\0.jpg", "circle.jpg"])
def test_impossible_file_name_is_missing(tmp_path, name):
    (tmp_path / "good.jpg").write_bytes(JPEG)
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    with pytest.raises(UnreadableImageError) as problem:
        read_image(tmp_path / name)
    assert problem.value.status is Status.MISSING


def test_format_is_detected_by_content(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(photo(), "PNG"))
    assert difference(read_image(tmp_path / "a.jpg"), photo()) == 0


def test_cmyk_colours():
    red = read_image(encoded(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95))
    assert difference(red, Image.new("RGB", (16, 16), RED)) < 2


def test_16_bits_keep_their_brightness():
    grey = read_image(encoded(Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)), "PNG"))
    assert np.unique(np.asarray(grey)).tolist() == [40_000 // 257]


def scaled(values: np.ndarray, format_: str = "TIFF", **tags: int) -> np.ndarray:
    """Save values, read them as RGB, and return one of the three equal channels."""
    info = {getattr(TiffImagePlugin, name): value for name, value in tags.items()}
    options = {"tiffinfo": info} if tags else {}
    pixels = np.asarray(read_image(encoded(Image.fromarray(values), format_, **options)))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


LEVELS = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize("format_", ["TIFF", "PPM"])
def test_floats_from_0_to_1_are_scaled(format_):
    np.testing.assert_array_equal(scaled((LEVELS / 255).astype(np.float32), format_), LEVELS)


@pytest.mark.parametrize("format_", ["TIFF", "PNG", "JPEG2000"])
def test_16_bits_are_scaled_in_every_format(format_):
    np.testing.assert_array_equal(scaled((LEVELS * 257).astype(np.uint16), format_), LEVELS)


@pytest.mark.parametrize("white", [65_535, 510])
def test_grey_maps_of_any_range_are_scaled(white):
    content = f"P5 16 16 {white}\n".encode() + (LEVELS * (white // 255)).astype(">u2").tobytes()
    np.testing.assert_array_equal(np.asarray(read_image(content))[..., 0], LEVELS)


@pytest.mark.parametrize(
    ("values", "white_is_zero"),
    [((LEVELS * 257).astype(np.uint16), 255 - LEVELS), ((LEVELS / 255).astype(np.float32), 255 - LEVELS)],
    ids=["16 bits", "float"],
)
def test_white_is_zero(values, white_is_zero):
    np.testing.assert_array_equal(scaled(values, PHOTOMETRIC_INTERPRETATION=0), white_is_zero)


def test_12_bits_are_scaled():
    values = [0, 4095, 2048, 16]
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x10])  # two values in three bytes
    entries = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: 6}.items():
        entries[tag] = value
    content = b"II*\0" + (8).to_bytes(4, "little") + entries.tobytes(8) + packed
    assert np.asarray(read_image(content))[0, :, 0].tolist() == [value * 255 // 4095 for value in values]


@pytest.mark.parametrize(
    "values",
    [
        LEVELS.astype(np.int32),
        LEVELS.astype(np.int32) * 65_536,
        LEVELS.astype(np.float32),
        np.full((4, 4), np.nan, dtype=np.float32),
        np.full((4, 4), -0.25, dtype=np.float32),
    ],
    ids=["int32", "large int32", "float to 255", "nan", "negative"],
)
def test_unknown_range_is_undecodable(values):
    with pytest.raises(UnreadableImageError) as problem:
        scaled(values)
    assert problem.value.status is Status.UNDECODABLE
    with pytest.raises(ValueError, match=r"black and white|expected 0 to 1"):
        upright_rgb(Image.fromarray(values))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([np.uint8, np.uint16, np.int32, np.float32]),
    st.floats(-2, 70_000, width=32),
    st.floats(-2, 70_000, width=32),
    st.sampled_from([None, "tiff_lzw", "tiff_adobe_deflate"]),
)
def test_no_picture_loses_its_contrast_unnoticed(dtype, low, high, compression):
    """Values that are read keep their order, and more than one level of their range remains visible."""
    limits = (-2, 70_000) if dtype == np.float32 else (0, min(np.iinfo(dtype).max, 70_000))
    values = np.clip(np.linspace(low, high, 64), *limits).astype(dtype).reshape(8, 8)
    with suppress(UnreadableImageError):
        read = np.asarray(read_image(encoded(Image.fromarray(values), "TIFF", compression=compression)))[..., 0]
        white = 1 if dtype == np.float32 else np.iinfo(dtype).max
        assert np.abs(read / 255 - values / white).max() <= 1 / 255


def test_original_image_is_not_changed():
    image = Image.open(BytesIO(encoded(photo(), "JPEG", exif=TURNED)))
    assert upright_rgb(image).size == (48, 64)
    assert image.size == (64, 48)
    assert image.getexif()[0x0112] == 6
    inverted = Image.open(BytesIO(encoded(Image.fromarray(np.zeros((2, 2), np.uint16)), "TIFF", tiffinfo={262: 0})))
    assert np.unique(upright_rgb(inverted)).tolist() == [255]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"


@pytest.mark.parametrize("content", [EPS, JPEG, b"", encoded(photo().convert("L"), "TIFF")])
def test_mask_that_is_no_png(tmp_path, content, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    (tmp_path / "mask.png").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"mask\.png: cannot identify image file, expected PNG"):
        FolderSource.read_mask(tmp_path / "mask.png")


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_few_bits_keep_their_values(tmp_path, bits):
    values = np.arange(2**bits, dtype=np.uint8).reshape(2, -1)
    stored = np.packbits(np.unpackbits(values[..., None], axis=-1)[..., -bits:].reshape(2, -1), axis=-1)
    rows = b"".join(b"\0" + row.tobytes() for row in stored)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], 2, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in [*chunks, (b"IEND", b"")]:
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    (tmp_path / "mask.png").write_bytes(content)
    np.testing.assert_array_equal(FolderSource.read_mask(tmp_path / "mask.png"), values)


def see_through(mode: str) -> Image.Image:
    """Left half red, right half transparent over hidden blue."""
    image = Image.new("RGBA", (8, 4), (*BLUE, 0))
    image.paste((*RED, 255), (0, 0, 4, 4))
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize(
    "content",
    [
        encoded(see_through("RGBA"), "PNG"),
        encoded(see_through("RGBA"), "WEBP", lossless=True, exact=True),
        encoded(see_through("RGBA").quantize(4), "PNG"),
        encoded(see_through("RGBA"), "GIF"),
        encoded(see_through("RGB"), "PNG", transparency=BLUE),
    ],
    ids=["rgba", "webp", "palette", "gif", "one colour"],
)
def test_transparent_pixels_are_white(content):
    pixels = np.asarray(read_image(content))
    assert (pixels[:, :4] == RED).all()
    assert (pixels[:, 4:] == WHITE).all()


def test_half_transparent_grey_is_blended_with_white():
    pixels = np.asarray(read_image(encoded(Image.new("LA", (4, 4), (0, 128)), "PNG")))
    assert np.unique(pixels).tolist() == [127]


@pytest.mark.parametrize("format_", ["GIF", "WEBP"])
def test_animation_gives_first_frame(format_):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE, BLUE)]
    first = read_image(encoded(frames[0], format_, save_all=True, append_images=frames[1:]))
    assert difference(first, frames[0]) < 2


def test_applies_exif_rotation():
    upright = read_image(encoded(photo(), "JPEG", quality=95, exif=TURNED))
    assert difference(upright, photo().transpose(Image.Transpose.ROTATE_270)) < 3


def test_broken_exif_data_are_ignored():
    exif = TURNED.tobytes()
    for cut in range(0, len(exif), 3):
        assert read_image(encoded(photo(), "JPEG", exif=exif[:cut])).width in (48, 64)


def test_starts_no_external_program():
    with pytest.raises(UnreadableImageError):
        read_image(EPS)


def test_pixel_limit():
    assert 0 < PIXEL_LIMIT <= 100_000_000
    too_large = encoded(Image.new("1", (PIXEL_LIMIT // 10_000 + 1, 10_000)), "PNG")
    with pytest.raises(UnreadableImageError) as problem:
        read_image(too_large)
    assert problem.value.status is Status.TOO_LARGE


def test_images_just_below_the_limit_are_read_without_a_warning(recwarn):
    nearly = encoded(Image.new("1", (PIXEL_LIMIT // 10_000, 10_000)), "PNG")
    assert read_image(nearly).size == (10_000, 10_000)
    assert not recwarn.list


def _wide(mode):
    values = np.arange(40 * 30).reshape(30, 40) * 50
    return Image.fromarray((values / values.max()).astype(np.float32) if mode == "F" else values.astype(np.uint16))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "F"])
def test_strips_make_no_difference(monkeypatch, mode):
    alpha = Image.fromarray((np.arange(64 * 48) % 256).reshape(48, 64).astype(np.uint8))
    if mode in ("I;16", "F"):
        image, options = _wide(mode), {}
    elif mode == "P":
        image, options = photo().convert("P", palette=Image.Palette.ADAPTIVE), {"transparency": 3}
    else:
        image, options = photo().resize(alpha.size).convert(mode), {}
        image.putalpha(alpha)
    content = encoded(image, "TIFF" if mode == "F" else "PNG", **options)
    whole = np.asarray(read_image(content))
    monkeypatch.setattr("sail_align.extract.sources.images.STRIP", 100)
    assert np.array_equal(read_image(content), whole)
    assert len(np.unique(whole)) > 50


def test_values_outside_the_range_are_found_in_any_strip(monkeypatch):
    monkeypatch.setattr("sail_align.extract.sources.images.STRIP", 100)
    values = np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)
    for bad in (np.nan, 1.5, -1):
        values[29, 39] = bad
        with pytest.raises(UnreadableImageError, match="got values from"):
            read_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 12), st.floats(0, 1))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_bytes_raise_only_unreadable(format_, seed, flips, kept):
    chance = random.Random(seed)
    content = bytearray(DAMAGED[format_])
    for _ in range(flips):
        content[chance.randrange(len(content))] = chance.randrange(256)
    damaged = bytes(content[: int(len(content) * kept)] if seed % 2 else content)
    with suppress(UnreadableImageError):
        assert read_image(damaged).mode == "RGB"


DAMAGED = {
    "JPEG": encoded(photo(), "JPEG", exif=TURNED),
    "PNG": encoded(photo().convert("RGBA"), "PNG", exif=TURNED),
    "WEBP": encoded(photo(), "WEBP", exif=TURNED),
    "GIF": encoded(photo(), "GIF", save_all=True, append_images=[photo()]),
    "TIFF": encoded(photo(), "TIFF", compression="tiff_lzw"),
    "BMP": encoded(photo(), "BMP"),
}


CROPS = [
    ImagePreprocessing(224, 224),
    ImagePreprocessing(224, 256),
    ImagePreprocessing(260, 292),
    ImagePreprocessing(224, 224, "bilinear"),
]


def whole_then_cut(image: Image.Image, how: ImagePreprocessing) -> Image.Image:
    """Resize all of the picture, then cut: what the published processors do."""
    width, height = (how.resize * side // min(image.size) for side in image.size)
    left, top = (width - how.crop) // 2, (height - how.crop) // 2
    filter_ = Image.Resampling[how.interpolation.upper()]
    return image.resize((width, height), filter_).crop((left, top, left + how.crop, top + how.crop))


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.exists(), reason="needs the photos of ../shared/data")
@pytest.mark.parametrize("how", CROPS)
def test_crop_while_resizing_equals_crop_after(how):
    """To rounding: Pillow resizes one direction first and rounds to whole levels in between."""
    for path in sorted((PHOTOS / "coco-mini/images").iterdir())[::8]:
        image = read_image(path)
        ours, theirs = (
            np.asarray(cropped, dtype=int) for cropped in (how.resize_and_crop(image), whole_then_cut(image, how))
        )
        assert np.abs(ours - theirs).mean() < 0.3
        assert (np.abs(ours - theirs) > 1).mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 10_000), (20_000, 2), (1, 1), (2, 3), (9_000, 5_000)])
@pytest.mark.parametrize("how", CROPS)
def test_resizes_any_shape_in_little_memory(size, how):
    image = Image.new("RGB", size, RED)
    before = getrusage(RUSAGE_SELF).ru_maxrss
    resized = how.resize_and_crop(image)
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 100_000  # KB; all of the first one enlarged takes 1.5 GB
    assert resized.size == (how.crop, how.crop)
    assert (np.asarray(resized) == RED).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "least", "read"),
    [
        ((1280, 960), 480, (640, 480)),
        ((1280, 960), 481, (1280, 960)),
        ((1280, 960), 100, (160, 120)),
        ((1280, 961), 100, (1280, 961)),  # half of it would be rounded up
        ((1284, 964), 100, (321, 241)),
        ((1280, 960), 0, (1280, 960)),
    ],
)
def test_reduces_jpeg_exactly(size, least, read):
    content = encoded(photo(*size), "JPEG")
    assert read_image(content, least=least).size == read
    assert read_image(encoded(photo(*size), "PNG"), least=least).size == size


def test_reduced_jpeg_is_rotated():
    reduced = read_image(encoded(photo(256, 128), "JPEG", quality=95, exif=TURNED), least=64)
    assert reduced.size == (64, 128)
    whole = read_image(encoded(photo(256, 128), "JPEG", quality=95, exif=TURNED))
    assert difference(reduced, whole.resize((64, 128), Image.Resampling.BOX)) < 2
