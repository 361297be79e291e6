"""Pictures of a store's rows, found by the manifest that the store was made from."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from PIL import Image
from pydantic import ValidationError

from sail_align.extract.data import Source, Status, UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest, data_root_of, find_manifest, packaged_manifests
from sail_align.extract.sources.images import FolderSource
from sail_align.extract.store.store import Store
from sail_align.extract.system.difference import describe_difference
from sail_align.extract.system.files import is_remote

NAME_THEM = "Name its manifest with --manifest, and the folder of its files with --data-root."


class Pictures:
    """The pictures of one store. They are opened by the store's source and never fetched from a URL.

    Args:
        store: The store.
        manifests: References of manifests that the user names. That of the store is found by its name.
        data_root: Folder of the manifest's files. Default: as of `sail-extract run`.

    Raises:
        UserError: A named manifest does not exist, is invalid, or describes other rows than the store of its name.
    """

    def __init__(self, store: Store, manifests: Sequence[str] = (), data_root: str | None = None):
        self._store, self._data_root = store, data_root
        named = {found[0].name: found for found in (find_manifest(each, data_root) for each in manifests)}
        self._named = named.get(store.dataset)
        if self._named and (difference := describe_difference(store.attributes["manifest"], self._named[0].rows)):
            raise UserError(
                f"{store.path} was made from another manifest of that name: {difference}. Name the right one."
            )

    @cached_property
    def problem(self) -> str:
        """Why the store's pictures cannot be shown; "" if they can."""
        try:
            _ = self._source
        except UserError as problem:
            return str(problem)
        return ""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels; empty if the source is not here."""
        return () if self.problem else self._source.classes

    def open(self, location: str, least: int = 0) -> Image.Image:
        """Open a picture as upright RGB. See `Source.image`.

        Raises:
            UnreadableImageError: The picture is missing or cannot be decoded, or the source is not here.
        """
        if self.problem or not location:
            raise UnreadableImageError(Status.MISSING, self.problem or "the row has no picture")
        try:
            return self._source.image(location, least)
        except (UserError, OSError) as problem:
            raise UnreadableImageError(Status.MISSING, str(problem)) from problem

    def path(self, location: str) -> Path | None:
        """Return the path of a picture's file. None if it is in an archive, or the source is not here."""
        if self.problem or not location or not isinstance(self._source, FolderSource):
            return None
        try:
            return self._source.fence.path(self._source.folder, location).absolute()
        except UserError:
            return None

    @cached_property
    def _source(self) -> Source:
        manifest, root = self._find()
        if urls := manifest.source.urls:
            raise UserError(f"The pictures of {self._store.dataset} are at {urls[0]}, which is not opened.")
        return manifest.open_source(root)

    def _find(self) -> tuple[Manifest, Path]:
        """Return the manifest of the store and its data root: a named one, that beside the store, or the recorded one.

        Raises:
            UserError: There is none, or nothing says where its files are.
        """
        store = self._store
        if self._named:
            return self._named
        if store.is_imported:
            raise UserError(f"{store.path} was imported, and imported stores do not record where their pictures are.")
        packaged = packaged_manifests().get(store.dataset)
        beside = store.path.with_name(f"{store.path.name.removesuffix('.zarr')}.yaml")
        for path, default in ((beside, beside.parent), (packaged, Path("data"))):
            if path and not is_remote(path) and path.is_file():
                manifest = Manifest.read(path)
                if not describe_difference(store.attributes["manifest"], manifest.rows):
                    return manifest, data_root_of(self._data_root, default)
        return self._recorded(), self._root()

    def _recorded(self) -> Manifest:
        """Return the manifest that the store records. It may be a stranger's, so it names no folder of this machine."""
        store = self._store
        try:
            manifest = Manifest.model_validate({**store.attributes["manifest"], "purpose": "train"})
        except ValidationError as problem:
            raise UserError(f"{store.path} does not say where its pictures are. {NAME_THEM}") from problem
        root = Path(getattr(manifest.source, "root", "."))
        if root.is_absolute() or ".." in root.parts:
            raise UserError(f"{store.path} records the folder {str(root)!r}, which is not opened. {NAME_THEM}")
        return manifest

    def _root(self) -> Path:
        root = data_root_of(self._data_root, Path())
        if not root.parts:
            raise UserError(f"The pictures of {self._store.path} are not found. {NAME_THEM}")
        return root
