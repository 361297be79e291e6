"""A user's mistake is one sentence and exit code 2; a fault of the program is a traceback and exit code 1."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. Its message is one sentence: what is wrong, which value, what to do."""


def run_command(app: Callable[[], object]) -> None:
    """Run a console command; a `UserError` becomes one sentence on stderr and exit code 2."""
    try:
        app()
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
