"""The preprocessing of images as other programs read it."""

from typing import Any

from PIL import Image


def processor_config(recorded: dict[str, Any], *, normalised: bool = True) -> dict[str, Any]:
    """Return a recorded preprocessing as `preprocessor_config.json` of transformers.

    Args:
        recorded: The `preprocessing` in the spec of an image encoder.
        normalised: Whether the result is normalised floats, or uint8 pixels.
    """
    side, resize = recorded["crop"], recorded["resize"]
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resize} if resize else {"height": side, "width": side},
        "resample": int(Image.Resampling[recorded["interpolation"].upper()]),
        "do_center_crop": resize is not None,
        "crop_size": {"height": side, "width": side},
        "do_rescale": normalised,
        "rescale_factor": 1 / 255,
        "do_normalize": normalised,
        "image_mean": recorded["mean"],
        "image_std": recorded["std"],
    }
