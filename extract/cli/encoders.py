"""sail-extract encoders: the encoders that have a name."""

from typing import Any

import typer
from tabulate import tabulate

from sail_align.extract.system.command_line import with_json

HEADER = ("name", "dim", "input", "parameters", "licence", "weights", "use")


@with_json
def encoders() -> dict[str, Any]:
    """List encoders with dimension, input size, parameters, licence and use.

    Input is the side of an image in pixels, or the longest text in tokens. Downloads in float32 take 4 bytes per
    parameter.
    """
    from sail_align.extract.encoders.catalogue import TEXT, VISION, describe

    listed = {
        modality: [{"name": name, **describe(entry)} for name, entry in entries.items()]
        for modality, entries in (("image", VISION), ("text", TEXT))
    }
    for modality, (option, unit) in {"image": ("--image-encoder", "px"), "text": ("--text-encoder", "tokens")}.items():
        rows = [
            (
                each["name"],
                each["dim"],
                f"{each['input']:,} {unit}",
                f"{each['parameters'] / 1e6:,.0f} M",
                each["licence"] or "unknown",
                f"pip: {each['source']}" if each["packaged"] else each["source"],
                each["use"],
            )
            for each in listed[modality]
        ]
        align = ("left", "right", "right", "right", "left", "left", "left")
        typer.echo(f"{modality} encoders ({option})")
        typer.echo(tabulate(rows, HEADER, "simple", disable_numparse=True, colalign=align) + "\n")
    typer.echo(
        "Any other: OWNER/NAME or a folder of transformers (hf:…), timm:MODEL, open_clip:MODEL@WEIGHTS. Name one in "
        "`sail-extract run`\nor in a manifest. dim is for the pooling listed with --json; --image-pooling and "
        "--text-pooling choose another."
    )
    return listed
