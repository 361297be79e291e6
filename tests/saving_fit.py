"""A fit that saves after every step, for processes that are killed or stopped while it runs."""

from pathlib import Path

from interrupted import die_at_write
from warm_processes import run_command

from sail_align.align.model import fused, pair_blocks
from sail_align.align.train import trainer


def fit(words: list[str], die_at: int | None = None, compiled: bool = False) -> None:
    """Run `sail-align fit`; die at the given write to disk, if any.

    Args:
        words: The options as typed.
        die_at: Number of the write at which the process kills itself.
        compiled: Compile loss and heads, in blocks of a few pairs, and write the number of compiled graphs to the file
            `graphs`.
    """
    if die_at is not None:
        die_at_write(die_at)
    trainer.fit.__kwdefaults__["save_seconds"] = 0
    if not compiled:
        return run_command("sail-align", "fit", *words)
    fused.MANY_UNITS = pair_blocks.MANY_PAIRS = 1
    pair_blocks.BLOCK_SIZE["cpu"] = 32
    try:
        run_command("sail-align", "fit", *words)
    finally:
        from torch._dynamo.utils import counters

        Path("graphs").write_text(str(counters["stats"]["unique_graphs"]))
