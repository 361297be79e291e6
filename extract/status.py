"""What became of one row of one array."""

from enum import IntEnum


class Status(IntEnum):
    """Stored as uint8; every value but `OK` means that the row's features are NaN."""

    OK = 0
    PENDING = 1
    """Its shard has not been written."""
    MISSING = 2
    """The image file is not there, or the sample has no such caption."""
    UNDECODABLE = 3
    """The bytes are no image that can be decoded, or no text: the caption holds U+FFFD."""
    TOO_LARGE = 4
    """More pixels than the limit."""
    NON_FINITE = 5
    """The encoder's output held NaN or infinity, or left float16's range."""

    @property
    def failed(self) -> bool:
        """Whether the row was tried and could not be encoded."""
        return self not in (Status.OK, Status.PENDING)

    @property
    def label(self) -> str:
        """The name in reports and markers: `too-large`."""
        return self.name.lower().replace("_", "-")
