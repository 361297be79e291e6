"""The zarr.json files of a store: groups, arrays, and the root, which has the digests and a copy of all others.

The copies are zarr's consolidated metadata, with which zarr, xarray and dask list a store without looking for its
arrays. Format 1 had neither these nor digests, and no zarr.json in some groups.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sail_align.extract.errors import UserError
from sail_align.extract.system.files import (
    NOT_A_STORE,
    canonical_json,
    digest_without,
    read_regular,
    report_read_errors,
    write_atomically,
)

STORE_FORMAT = 2
FORMATS = (1, STORE_FORMAT)
FILE = "zarr.json"
CONSOLIDATED = {"kind": "inline", "must_understand": False}
"""Fields of consolidated metadata, beside the metadata."""

Document = dict[str, Any]
"""The content of a zarr.json."""


def read_document(folder: Path) -> Document:
    """Return the content of a group's or array's zarr.json. Raises `UserError` if it is missing or damaged."""
    with report_read_errors(folder / FILE):
        document = json.loads(read_regular(folder / FILE))
        if not isinstance(document, dict):
            raise TypeError
    return document


def write_document(folder: Path, document: Document) -> None:
    """Write a zarr.json, whole or not at all."""
    write_atomically(folder / FILE, canonical_json(document))


def group(attributes: Mapping[str, Any]) -> Document:
    """Return the zarr.json of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def groups_above(array: str) -> list[str]:
    """Return the paths of the groups that lead to an array of features, from the top: text, text/x, text/x/raw."""
    parts = array.split("/")
    return ["/".join(parts[: number + 1]) for number in range(len(parts))]


def array_paths(nodes: Iterable[str]) -> list[str]:
    """Return the paths of the arrays of features among those of all groups and arrays: image/x, text/x/raw."""
    parts = [node.split("/") for node in nodes]
    depth = {"image": 3, "text": 4}
    found = sorted(each[:-1] for each in parts if each[-1] == "status" and len(each) == depth.get(each[0]))
    return ["/".join(each) for each in found]


def digest_of(document: Document) -> str:
    """Return the SHA-256 of a zarr.json's content, without the empty entry that zarr writes into copies of groups."""
    is_empty = document.get("consolidated_metadata") == {**CONSOLIDATED, "metadata": {}}
    return digest_without(document, *(["consolidated_metadata"] if is_empty else []))


def read_root(path: Path) -> dict[str, Any]:
    """Return the attributes of a store.

    Raises:
        UserError: The path is not a store, has a newer format, cannot be read, or the file is not what was written.
    """
    file = path / FILE
    with report_read_errors(file):
        try:
            document = json.loads(read_regular(file))
            attributes: dict[str, Any] = document["attributes"]["sail"]
            version = attributes["format"]
        except (FileNotFoundError, NotADirectoryError, KeyError, TypeError) as problem:
            raise UserError(NOT_A_STORE.format(path=path)) from problem
    if type(version) is not int or version not in FORMATS:
        raise UserError(f"{path} has store format {version!r}, expected {STORE_FORMAT}. Update sail-align.")
    has_seal = version == STORE_FORMAT or not attributes.keys().isdisjoint({"sha256", "metadata_sha256"})
    if has_seal and not _is_sealed(document, attributes):
        raise UserError(f"{file} is damaged: its content is not what was written. Restore it.")
    return attributes


def _is_sealed(document: Document, attributes: Mapping[str, Any]) -> bool:
    """Return whether the attributes and the copies of other zarr.json in a root have their digests."""
    try:
        form = {**group(document["attributes"]), "consolidated_metadata": {**CONSOLIDATED}}
        form["consolidated_metadata"]["metadata"] = copies = document["consolidated_metadata"]["metadata"]
        found = {node: digest_of(copy) for node, copy in copies.items()}
        return (
            document == form
            and attributes["sha256"] == digest_without(attributes, "sha256")
            and attributes["metadata_sha256"] == found
        )
    except (KeyError, TypeError, AttributeError):  # of another form
        return False


def write_root(path: Path, attributes: Mapping[str, Any], documents: Mapping[str, Document]) -> dict[str, Any]:
    """Write the zarr.json of a store.

    Args:
        path: The store.
        attributes: What the store is made from; digests among them are replaced.
        documents: The zarr.json of each group and array below, by path.

    Returns:
        The attributes with their digests.
    """
    sealed = {**attributes, "metadata_sha256": {node: digest_of(each) for node, each in documents.items()}}
    sealed["sha256"] = digest_without(sealed, "sha256")
    write_document(
        path, {**group({"sail": sealed}), "consolidated_metadata": {**CONSOLIDATED, "metadata": dict(documents)}}
    )
    return sealed
