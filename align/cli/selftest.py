"""sail-align selftest: its options and its output."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sail_align.extract.errors import UserError
from sail_align.extract.system.command_line import BadResult, Device, Quiet, Result, jsonable, with_json
from sail_align.extract.system.files import report_write_errors, write_atomically
from sail_align.extract.system.progress import note


@with_json
def selftest(
    minutes: Annotated[
        float, typer.Option(min=0.05, max=600, help="Time for checks and measurements.", rich_help_panel="Run")
    ] = 5.0,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON file with the results, to attach to an issue.")
    ] = Path("selftest.json"),
    device: Device = "auto",
    quiet: Quiet = False,
) -> Result:
    """Check a device against the CPU in float64, and measure it."""
    if out.is_dir():
        raise UserError(f"--out is invalid: {out} is a folder. Name a file.")
    if not out.parent.is_dir():
        raise UserError(f"--out is invalid: {out.parent} does not exist. Create it, or name another file.")

    from sail_align.align.analysis.selftest.report import SelfTest
    from sail_align.extract.encoders.runtime import Runtime

    where = Runtime.of(device, "float32").device
    result = SelfTest.run(where, minutes, say=lambda name: None if quiet else note(f"checking: {name}"))
    record = result.record()
    typer.echo(f"\n{result.table()}\n\n{result.summary()}")
    with report_write_errors(out):
        write_atomically(out, json.dumps(jsonable(record), indent=1, ensure_ascii=False).encode())
    typer.echo(f"wrote {out}")
    answer = {"out": str(out), **record}
    if result.failed:
        raise BadResult(answer)
    return answer
