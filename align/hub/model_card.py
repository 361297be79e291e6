"""The model card of an exported run: metadata for the hub, then text for readers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from pydantic import Field
from typing_extensions import TypedDict

from sail_align.align.runs.checkpoint import Run
from sail_align.align.runs.folder import RunFolder, content_digest, damaged, read_json
from sail_align.align.stats.tables import format_interval, format_table, number
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.system.validation import validated

_TASK = "zero-shot-image-classification"
"""The hub's name for the task of models that compare images with texts."""

_TASKS = {"classification": _TASK, "segmentation": "image-segmentation"}
"""The hub's names of our tasks. Other tasks keep our names."""

Record = dict[str, Any]


class _Weights(TypedDict):
    digest: str


class _Scores(TypedDict):
    run: _Weights
    records: list[Record]


class _Metric(TypedDict):
    name: str
    label: str
    value: float
    chance: float
    interval: Annotated[list[float], Field(min_length=2, max_length=2)]


class _Scored(TypedDict):
    """The fields of a record that a card shows."""

    dataset: str
    title: str
    task: str
    protocol: str
    items: int
    metrics: list[_Metric]


def read_scores(run: Run) -> tuple[list[Record], bool]:
    """Return the scores that `sail-eval` wrote to a run, and whether scores of other weights were left out.

    Raises:
        UserError: The file of the scores is damaged.
    """
    path, remedy = RunFolder(run.path).scores / "scores.json", "Remove it and score the run again with `sail-eval`."
    if not path.is_file():
        return [], False
    scores = read_json(path, remedy)
    if scores.get("digest", "") not in ("", content_digest(scores)):
        raise damaged(path, remedy)
    try:
        form = validated(_Scores, scores)
        if form["run"]["digest"] != run.digest:
            return [], True
        records = [record for record in form["records"] if "metrics" in record]
        for record in records:
            validated(_Scored, record)
    except ValueError as problem:
        raise damaged(path, remedy) from problem
    return records, False


def model_card(
    run: Run, scores: Sequence[Record], licence: str, *, library: str = "sail-align", usage: str | None = None
) -> str:
    """Return the text of a README.md with metadata, scores, and the digests of encoders and data.

    Args:
        run: The run.
        scores: See `read_scores`.
        licence: Licence of the heads.
        library: The hub's name of the library that loads the folder.
        usage: What the folder contains and how it is loaded, in Markdown. None is for folders of heads.
    """
    name = RunFolder(run.path).run.path.resolve().name
    sources = [each.spec.source for side in (run.image, run.text) for each in side.singles]
    about = ModelCardData(
        license=licence,
        library_name=library,
        pipeline_tag=_TASK,
        tags=["sail", "clip", "vision-language"],
        base_model=list(dict.fromkeys(each["repository"] for each in sources if "repository" in each)) or None,
        model_name=name,
        eval_results=[_result(record, metric) for record in scores for metric in record["metrics"]] or None,
    )
    parts = [f"---\n{about.to_yaml()}\n---", _introduction(run, name, usage or _usage(name))]
    if scores:
        parts.append(_scores(scores))
    parts += [_origin(run), _settings(run)]
    return str(ModelCard("\n\n".join(parts) + "\n", ignore_metadata_errors=False))


def _introduction(run: Run, name: str, usage: str) -> str:
    image, text = run.image.spec, run.text.spec
    steps = "" if run.finished else f"\n\nTraining was not finished: these are the weights after {run.step:,} steps."
    return f"""# {name}

Two heads that map the features of two frozen encoders, `{image.id}` for images and `{text.id}` for texts, into a shared
space (SAIL: Swift Alignment of Image and Language). {usage}{steps}"""


def _usage(name: str) -> str:
    return f"""This repository contains the heads. The encoders are loaded from
where their authors published them, and rejected if they differ from those used in training.

```python
import sail_align  # pip install sail-align

model = sail_align.load("<owner>/{name}")
probabilities = model.classify(["photo.jpg"], ["a cat", "a dog"], templates="a photo of {{}}")
```

Or with the transformers library:

```python
import sail_align.transformers
from transformers import pipeline

classify = pipeline("{_TASK}", model="<owner>/{name}")
classify("photo.jpg", candidate_labels=["a cat", "a dog"], hypothesis_template="a photo of {{}}")
```"""


def _scores(scores: Sequence[Record]) -> str:
    rows = [
        (
            record["title"],
            metric["label"],
            number(metric["value"]),
            format_interval(metric["interval"], metric["value"]),
            number(metric["chance"]),
            f"{record['items']:,}",
            f"`{record['protocol']}`",
        )
        for record in scores
        for metric in record["metrics"]
    ]
    head = ("data", "metric", "score", "95 % interval", "chance", "items", "protocol")
    about = "Zero-shot, by `sail-eval`, in per cent. Ranks count from 1."
    return f"## Scores\n\n{about}\n\n{_table(head, rows)}"


def _origin(run: Run) -> str:
    def row(side: str, identity: Identity) -> tuple[str, ...]:
        spec = identity.spec
        source = ", ".join(value for name, value in spec.source.items() if name != "config")
        return side, f"`{spec.id}`", source, spec.pooling, spec.precision, f"{spec.dim:,}", f"`{spec.fingerprint}`"

    sides = {"image": run.image, "text": run.text}
    rows = [row(side, single) for side, identity in sides.items() for single in identity.singles]
    head = ("encoder", "id", "source", "pooling", "precision", "dimensions", "fingerprint")
    text = f"## Provenance\n\n{_table(head, rows)}"
    if imported := run.settings.get("imported"):
        return (
            f"{text}\n\nThe heads were imported from `{imported['file']}` (SHA-256 `{imported['sha256']}`), not "
            f"trained by sail-align. Run digest: `{run.digest}`."
        )
    stores = zip(run.settings.get("stores", []), run.settings.get("store_digests", []), strict=True)
    data = _table(("features", "digest"), [(Path(path).name, f"`{digest}`") for path, digest in stores])
    return f"{text}\n\nRun digest: `{run.digest}`. Trained on {run.settings['training_rows']:,} pairs of\n\n{data}"


def _settings(run: Run) -> str:
    sides = {"image_encoder", "image_encoders", "text_encoder", "text_encoders"}
    skipped = {"imported", "stores", "store_digests", "features_digests", *sides}
    chosen = [(name, _words(value)) for name, value in run.settings.items() if not (name in skipped or value is None)]
    return f"## Settings\n\n{_table(('setting', 'value'), chosen)}"


def _result(record: Record, metric: dict[str, Any]) -> EvalResult:
    task: str = record["task"]
    return EvalResult(
        task_type=_TASKS.get(task, task),
        dataset_type=record["dataset"],
        dataset_name=record["title"],
        metric_type=metric["name"],
        metric_name=f"{metric['label']} ({record['protocol']})",
        metric_value=round(metric["value"], 4),
    )


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose cells may contain bars."""
    return format_table(head, [[cell.replace("|", "\\|") for cell in row] for row in rows], "l" * len(head))
