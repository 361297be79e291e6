"""Errors with a message for the user: what is wrong, the value, and what to do."""


class UserError(Exception):
    """A mistake that the user can correct. Commands print its message and exit with code 2."""


class StoreExistsError(UserError):
    """A store cannot be created because it exists."""


class WorkersFailedError(Exception):
    """Work is unfinished because workers failed. Each failure was reported before. Commands exit with code 1."""
