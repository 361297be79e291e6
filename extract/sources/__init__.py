"""Where samples come from: one file a kind."""

from pathlib import Path
from typing import TYPE_CHECKING

from sail_align.extract import schema as described
from sail_align.extract.data import Source
from sail_align.extract.errors import UserError

if TYPE_CHECKING:  # a manifest is made of the descriptions beside this
    from sail_align.extract.manifest import Manifest


def open_source(manifest: "Manifest", data_root: Path) -> Source:
    """Open what a manifest describes. Raises `UserError` if its files are not there or not of the described form."""
    source = _open(manifest, data_root)
    if manifest.recaptions:
        from sail_align.extract.sources.tabular import caption_tables

        source.recaptions = caption_tables(manifest.recaptions, data_root)
        if twice := [name for name in manifest.recaptions.captions if name in source.captions]:
            raise UserError(f"{manifest.name} has a caption {twice[0]!r} already; rename it under 'recaptions'.")
    return source


def _open(manifest: "Manifest", data_root: Path) -> Source:
    match manifest.source:
        case described.TableSource():
            from sail_align.extract.sources.table import TableSource

            return TableSource(manifest.source, data_root)
        case described.ClassFolderSource():
            from sail_align.extract.sources.class_folder import ClassFolderSource

            return ClassFolderSource(manifest.source, data_root)
        case described.CocoCaptionsSource():
            from sail_align.extract.sources.annotated import CocoCaptionsSource

            return CocoCaptionsSource(manifest.source, data_root)
        case described.KarpathySource():
            from sail_align.extract.sources.annotated import KarpathySource

            return KarpathySource(manifest.source, data_root)
        case described.WinogroundSource():
            from sail_align.extract.sources.annotated import WinogroundSource

            return WinogroundSource(manifest.source, data_root)
        case described.MmvpSource():
            from sail_align.extract.sources.annotated import MmvpSource

            return MmvpSource(manifest.source, data_root)
        case described.MaskFolderSource():
            from sail_align.extract.sources.mask_folder import MaskFolderSource

            return MaskFolderSource(manifest.source, data_root)
        case described.WebDatasetSource():
            from sail_align.extract.sources.webdataset import WebDatasetSource

            return WebDatasetSource(manifest.source, data_root)
        case described.HuggingFaceSource():
            from sail_align.extract.sources.hugging_face import HuggingFaceSource

            return HuggingFaceSource(manifest.source, data_root)
        case described.DemoSource():
            from sail_align.extract.sources.demo.source import DemoSource

            return DemoSource(manifest.source.part)
