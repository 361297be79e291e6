"""Building the store of a data set, from Python as from the command line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sail_align.extract.errors import UserError, command
from sail_align.extract.manifest import (
    Manifest,
    data_root_of,
    find_manifest,
    is_manifest,
    packaged_manifests,
    shown_root,
)
from sail_align.extract.recognise.columns import Choices
from sail_align.extract.recognise.record import Recognised
from sail_align.extract.system.files import as_path, is_remote
from sail_align.extract.system.progress import note

if TYPE_CHECKING:
    from sail_align.extract.data import Source
    from sail_align.extract.executor.job import Job
    from sail_align.extract.executor.local import LocalExecutor
    from sail_align.extract.executor.ray_cluster import RayCluster
    from sail_align.extract.store.store import Store


def _ignore(*received: object) -> None:
    """Do nothing."""


def _note_recognised(recognised: Recognised, file: Path, is_new: bool) -> None:
    """Print a note on what data were recognised as, and where their manifest is."""
    for line in (*recognised.lines, f"{'wrote' if is_new else 'using'} {file}"):
        note(line)


@dataclass(frozen=True)
class Report:
    """Receivers of what a build finds and does.

    Attributes:
        recognised: Called with what a path of data holds, the file of its manifest, and whether this file is new.
        source_opened: Called with the data set before anything is downloaded or written.
        store_opened: Called with the store before anything is encoded.
        encoded: Called at the end with the store, the job and summaries of the encoding and perhaps of a retry.
    """

    recognised: "Callable[[Recognised, Path, bool], object]" = _ignore
    source_opened: "Callable[[Manifest, Source], object]" = _ignore
    store_opened: "Callable[[Manifest, Store], object]" = _ignore
    encoded: "Callable[[Store, Job, Sequence[object]], object]" = _ignore


def build_store(
    data: "str | Path | Manifest",
    *,
    out: str | Path | None = None,
    image_column: str | None = None,
    caption_columns: str | Sequence[str] | None = None,
    images: str | Path | None = None,
    image_encoder: str | None = None,
    image_pooling: str | None = None,
    image_size: int | None = None,
    text_encoder: str | None = None,
    text_pooling: str | None = None,
    text_prompt: str | None = None,
    layers: str | Sequence[int] | None = None,
    text_layers: str | Sequence[int] | None = None,
    captions: str | Sequence[str] | None = None,
    add_captions: str | Sequence[str] | None = None,
    data_root: str | Path | None = None,
    device: str = "auto",
    precision: str = "float32",
    allow_remote_code: str | Sequence[str] = (),
    compile: bool = False,
    fast_jpeg: bool = False,
    workers: str | int = "auto",
    worker: str = "1/1",
    engine: str = "local",
    ray_address: str | None = None,
    retry: str | None = None,
    download: bool = False,
    quiet: bool = False,
    report: Report | None = None,
) -> "Store":
    """Encode a data set into a store of features, as `sail-extract run` does. Call it again to resume.

    Args:
        data: Name of a packaged manifest such as "demo", path of a manifest, or a manifest. Or the path of data: a
            folder of images, class folders, a table (.csv, .tsv, .jsonl, .parquet), tars, a folder of the Hugging Face
            library, or annotations of COCO or Karpathy (.json). Their manifest is then written beside the store.
        out: Path or URL of the store, which is created or resumed. Default: `features/<manifest name>.zarr`.
        image_column: Column of the images' paths in a table of yours, if several could be.
        caption_columns: Columns of captions in data of yours, if several could be, as a sequence or as "title,text".
        images: Folder of the images that a table or annotation file of yours names, if it is not near the file.
        image_encoder: Name (`sail-extract encoders` lists them), hf:REPOSITORY, timm:MODEL or open_clip:MODEL.
                Default: the manifest's, else "dinov2-large".
        image_pooling: "cls", "mean", "cls+mean", "pooler" or "pooler+mean". Default: the encoder's own.
        image_size: Height and width of the images that the encoder gets, a multiple of its patch size. Default: the
            manifest's, else the encoder's own.
        text_encoder: Name, hf:REPOSITORY or open_clip:MODEL. Default: the manifest's, else "gte-large".
        text_pooling: "cls", "mean", "last", "max", "weightedmean" or "mean_sqrt_len_tokens". Default: the
            encoder's own.
        text_prompt: Text that is put before each text, such as an instruction. Default: the encoder's own for
            documents.
        layers: Layers of both encoders to store, counted from the end, such as "-1,-4,-8". Default: the output, -1.
        text_layers: Layers of the text encoder, if they differ.
        captions: Names of the captions to encode, as a sequence or as "raw,long". Default: the manifest's, else all.
        add_captions: Captions to add to an existing store, without reading its images.
        data_root: Folder of the manifest's files. Default: `$SAIL_DATA_ROOT`, else the folder of the manifest's file,
            `data` for a packaged manifest, and the current folder for a `Manifest`.
        device: "cpu", "cuda", "cuda:1" …, or "auto" for a GPU if there is one.
        precision: Precision of the encoders: "float32", "tf32" (on NVIDIA GPUs), "bfloat16" or "float16".
        allow_remote_code: Repositories that may run their own code, each as "owner/name@revision" with a full commit
            hash. No other code is run.
        compile: Compile the encoders with `torch.compile`.
        fast_jpeg: Decode large JPEGs at a reduced scale.
        workers: Processes on this machine, or "auto".
        worker: Encode only this worker's shards, as "N/OF".
        engine: "local" for this machine, "ray" for a Ray cluster.
        ray_address: The Ray cluster. Default: `$RAY_ADDRESS`, else this machine alone.
        retry: "failed" retries the images that could not be encoded.
        download: First download the images, if the manifest has `download`. They are not downloaded twice.
        quiet: Print nothing, and show no progress bars.
        report: Receives what is found and done. Default: notes say what a path of data was recognised as.

    Returns:
        The opened store.

    Raises:
        UserError: An option is invalid, data or an encoder are missing, or the store belongs to other data.
        WorkersFailedError: Shards are left because workers failed.
        StoppedError: SIGTERM or Ctrl-C, for which `sail_align.build_store` raises `KeyboardInterrupt`.
    """
    report = report or Report(recognised=_ignore if quiet else _note_recognised)
    _check_options(retry, workers, add_captions, captions or image_encoder or image_size)
    if download and (add_captions or worker != "1/1"):
        raise UserError("--download is for one process that reads images. Omit --add-captions and --worker.")
    folder = Path(images) if images else None
    choices = Choices(image_column, tuple(_names(caption_columns) if caption_columns else ()), folder)
    if isinstance(data, str | Path) and _is_own_data(str(data)):
        if data_root or download:
            option = "--data-root" if data_root else "--download"
            raise UserError(f"{option} has no effect: {data} is the path of the data. Omit it.")
        manifest, root, path = _recognise(
            Path(data), choices, {"image": image_encoder, "text": text_encoder}, out, report
        )
    else:
        choices.require_unused(tuple(choices.given()), "a manifest names its columns and folders")
        manifest, root = _find_data(data, data_root)
        path = as_path(out) if out else Path("features") / f"{manifest.name}.zarr"
        if download:
            from sail_align.extract.download import download_all

            download_all(manifest, root, quiet=quiet)
        elif not add_captions:
            _require_data(data, manifest, root)

    from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
    from sail_align.extract.encoders.runtime import Runtime, require_tf32
    from sail_align.extract.executor.job import Job
    from sail_align.extract.executor.retry import retry_failed
    from sail_align.extract.executor.run import run_job
    from sail_align.extract.executor.worker import Share
    from sail_align.extract.store.store import Store

    code = tuple([allow_remote_code] if isinstance(allow_remote_code, str) else allow_remote_code)
    text_name = text_encoder or manifest.encoders.text
    image: ImageEncoderConfig | None = None
    if add_captions:
        store = Store.open(path)
        known, chosen = store.captions, _names(add_captions)
        if not text_encoder and (identity := store.text_identity()):
            recorded = TextEncoderConfig.recorded(identity)
            text_name, text_pooling, precision = recorded.name, recorded.pooling, recorded.precision
            text_prompt = recorded.prompt
            text_layers = text_layers or layers or recorded.layers
    else:
        image_name = image_encoder or manifest.encoders.image
        # The manifest's size is for its encoder.
        size = image_size or (None if image_encoder else manifest.encoders.image_size)
        image = ImageEncoderConfig(
            image_name, image_pooling, precision, code, compile, _layers(layers), fast_jpeg, size
        )
        source = manifest.open_source(root)
        report.source_opened(manifest, source)
        known = source.all_captions
        chosen = _names(captions) if captions else manifest.encoders.captions or _in_store(known, path)
    for name in chosen:
        if name not in known:
            raise UserError(f"{manifest.name} has no caption {name!r}. Its captions are: {', '.join(known) or 'none'}.")
    of_text = _layers(text_layers, "--text-layers") if text_layers else _layers(layers)
    options = (text_pooling, precision, code, compile, of_text, text_prompt)
    text = TextEncoderConfig(text_name, *options) if chosen else None
    _require_used(code, [getattr(getattr(config, "entry", None), "origin", None) for config in (image, text) if config])
    runtime = Runtime.of(device, precision, several=True)  # raises if either is invalid
    if precision == "tf32":
        require_tf32(runtime.device.type)
    if not quiet and (line := runtime.explain()):
        note(line)
    job = Job(manifest, root, path, image, text, tuple(chosen))
    share, executor = Share.parse(worker), _choose_executor(engine, ray_address, str(workers), device)
    if engine == "local" and not (path / "zarr.json").exists():
        for encoder in filter(None, (image, text)):
            encoder.download()  # before the store is created
    results: list[object] = [run_job(job, executor, share, partial(report.store_opened, manifest), quiet=quiet)]
    if retry:
        results.append(retry_failed(job, share, device, quiet=quiet))
    store = Store.open(path)
    report.encoded(store, job, results)
    return store


def _check_options(
    retry: str | None, workers: str | int, add_captions: object | None, conflicting: object | None
) -> None:
    if retry not in (None, "failed"):
        raise UserError(f"--retry {retry!r} is invalid: expected failed.")
    if retry and str(workers) not in ("auto", "1"):
        raise UserError("--retry works in one process. Omit --workers, or split the shards with --worker N/OF.")
    if add_captions and (conflicting or retry):
        raise UserError(
            "--add-captions does not read images. Omit --captions, --image-encoder, --image-size and --retry."
        )


def _require_used(code: Sequence[str], origins: Sequence[object]) -> None:
    """Raise `UserError` if a repository that may run code is that of neither encoder."""
    known = [getattr(origin, "repository", None) for origin in origins]
    for reference in code:
        if reference.partition("@")[0].removeprefix("hf:") not in known:
            raise UserError(
                f"--allow-remote-code {reference} has no effect: neither encoder is of that repository. Omit it."
            )


def _is_own_data(reference: str) -> bool:
    return reference not in packaged_manifests() and not is_manifest(reference) and Path(reference).exists()


def _recognise(
    data: Path, choices: Choices, encoders: Mapping[str, str | None], out: str | Path | None, report: Report
) -> tuple[Manifest, Path, Path]:
    """Write the manifest of the user's data beside their store, and return it with its data root and the store's path.

    Raises:
        UserError: The data cannot be read, the user has to pass an option, or another manifest is there.
    """
    recognised = Recognised.of(data, choices, encoders)

    from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig

    for config, name in ((ImageEncoderConfig, encoders["image"]), (TextEncoderConfig, encoders["text"])):
        _ = name and config(name).entry  # raises before anything is written if it is unknown
    path = as_path(out) if out else Path("features") / f"{recognised.name}.zarr"
    beside = Path("features") / path.name if is_remote(path) else path
    file = beside.with_name(f"{beside.name.removesuffix('.zarr')}.yaml")
    report.recognised(recognised, file, recognised.write(file))
    return Manifest.read(file), file.parent, path


def _find_data(data: "str | Path | Manifest", data_root: str | Path | None) -> tuple[Manifest, Path]:
    """Return a manifest and its data root."""
    if isinstance(data, Manifest):
        return data, data_root_of(data_root, Path())
    return find_manifest(str(data), data_root)


def _require_data(data: "str | Path | Manifest", manifest: Manifest, root: Path) -> None:
    """Raise `UserError` with commands, disk space and time if the data of a published set are missing.

    The source of other manifests names the file that is missing.
    """
    if not isinstance(data, Manifest) and (manifest.download or str(data) in packaged_manifests()):
        if manifest.is_here(root):
            return
        from sail_align.extract.needs import describe_needs

        lines = [f"The data of {manifest.name!r} are not in {shown_root(root)}. To get them:"]
        lines += [f"    {line}" for line in manifest.get.strip().splitlines()]
        lines += describe_needs(manifest, root)
        if manifest.download:
            whole = command("sail-extract", "run", data, "--download")
            lines.append(f"`{whole}` downloads and encodes them as one job; rerun it to resume.")
        raise UserError("\n".join(lines))


def _names(captions: str | Sequence[str]) -> list[str]:
    given = captions.split(",") if isinstance(captions, str) else captions
    return [name.strip() for name in given]


def _layers(given: str | Sequence[int] | None, option: str = "--layers") -> tuple[int, ...]:
    from sail_align.extract.encoders.layers import OUTPUT, parse_layers

    if given is None:
        return OUTPUT
    return parse_layers(given if isinstance(given, str) else ",".join(map(str, given)), option)


def _in_store(captions: Sequence[str], path: Path) -> list[str]:
    """Return the captions that a store has if it exists: an earlier version may have found fewer in the same data."""
    from sail_align.extract.store.store import Store

    existing = Store.open(path).captions if (path / "zarr.json").exists() else captions
    return [name for name in captions if name in existing]


def _choose_executor(engine: str, ray_address: str | None, workers: str, device: str) -> "LocalExecutor | RayCluster":
    if engine == "ray":
        from sail_align.extract.executor.ray_cluster import RayCluster

        return RayCluster(ray_address, workers, device)
    if engine != "local":
        raise UserError(f"--engine {engine!r} is invalid: expected local or ray.")
    if ray_address:
        raise UserError(f"--ray-address {ray_address} has no effect with --engine local. Add --engine ray.")
    from sail_align.extract.executor.local import LocalExecutor

    return LocalExecutor.choose(workers, device)
