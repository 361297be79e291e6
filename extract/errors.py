"""A user's mistake is one sentence and exit code 2; a fault of the program is a traceback and exit code 1."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. Its message is one sentence: what is wrong, which value, what to do."""


class StoreExistsError(UserError):
    """A store cannot be made where there is one."""


class WorkersFailedError(Exception):
    """Work is left undone because workers failed. Its message is one sentence; what befell each was said before."""


def run_command(app: Callable[[], object]) -> None:
    """Run a console command; one sentence on stderr for a `UserError`, exit code 2, and for failed workers, 1."""
    try:
        app()
    except WorkersFailedError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(1)
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
