"""A run as a model of mteb, which includes MIEB: its tasks, data and metrics with our embeddings.

MtebModel("runs/photos-linear", None, device="cpu") can be passed to `mteb.evaluate`, and `evaluate` does so. mteb is an
optional package and takes seconds to import, so it is imported when it is used.
"""

import importlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sail_align.align.pretrained import load
from sail_align.align.runs.folder import RunFolder
from sail_align.extract.errors import UserError, did_you_mean, import_extra
from sail_align.extract.system.files import report_write_errors

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.models import ModelMeta
    from mteb.results import ModelResult
    from torch.utils.data import DataLoader

MODALITIES = ("image", "text")
BATCH = 32
"""Items that mteb passes at once. Encoders choose their own batches within these."""
Embeddings = NDArray[np.float32]


class MtebModel:
    """A run that fulfils mteb's `EncoderProtocol`.

    An input with an image and a text is embedded as the sum of both embeddings, as mteb does it for CLIP models.

    Args:
        model_name: A run, an exported folder, or a repository of the hub, as for `load`.
        revision: Revision of the repository; None for a folder.
        device: Device of the model. None and `auto` use a GPU if there is one.
        **kwargs: Further arguments of `load`.
    """

    def __init__(self, model_name: str, revision: str | None = None, *, device: str | None = None, **kwargs: Any):
        self.name = mteb_name(model_name)
        self.model = load(model_name, revision=revision, device=device or "auto", **kwargs)

    @cached_property
    def mteb_model_meta(self) -> "ModelMeta":
        """The metadata that mteb stores with results. The revision is the digest of the run."""
        _mteb()
        meta: Any = importlib.import_module("mteb.models").ModelMeta
        run = self.model.run
        parameters = sum(each.numel() for each in self.model.parameters())
        size = sum(each.numel() * each.element_size() for each in self.model.parameters())
        described: ModelMeta = meta(
            loader=MtebModel,
            name=self.name,
            revision=run.digest,
            release_date=None,
            languages=None,
            n_parameters=parameters,
            memory_usage_mb=size / 2**20,
            max_tokens=run.text.spec.preprocessing.get("token_limit"),
            embed_dim=self.model.dim,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name="cosine",
            use_instructions=False,
            training_datasets=None,
            modalities=list(MODALITIES),
        )
        return described

    def encode(self, inputs: "DataLoader[Any]", *, show_progress_bar: bool = True, **kwargs: Any) -> Embeddings:
        """Embed batches of texts, of images, or of both, (N, E).

        Args:
            inputs: Batches with lists `text`, `image` or both.
            show_progress_bar: Show a progress bar.
            **kwargs: Not used: task, split, prompt and batch size, which do not change the embeddings.

        Raises:
            ValueError: A batch has neither texts nor images.
        """
        encode = {"image": self.model.encode_image, "text": self.model.encode_text}
        embeddings = []
        for batch in tqdm(inputs, desc="embeddings", disable=not show_progress_bar, leave=False):
            parts = [encode[each](list(batch[each])).cpu() for each in MODALITIES if each in batch]
            if not parts:
                raise ValueError(f"A batch has {', '.join(batch)}; expected {' or '.join(MODALITIES)}.")
            embeddings.append(sum(parts[1:], parts[0]))
        result: Embeddings = torch.cat(embeddings).numpy()
        return result

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return the cosine of each of the first embeddings (N, E) with each of the second (M, E): (N, M)."""
        one_NE, other_ME = (_unit_rows(each) for each in (embeddings1, embeddings2))
        return one_NE @ other_ME.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return the cosine of each of the first embeddings with its counterpart: (N,)."""
        one_NE, other_NE = (_unit_rows(each) for each in (embeddings1, embeddings2))
        return (one_NE * other_NE).sum(dim=-1)


def mteb_name(reference: str | Path) -> str:
    """Return the name of a model in mteb's form: `owner/name` of a repository, `sail-align/<run>` of a folder."""
    path = Path(reference)
    if not path.is_dir():
        return str(reference)
    return "sail-align/" + re.sub(r"[^\w.-]+", "-", RunFolder(path).name)


def find_tasks(names: Iterable[str], benchmarks: Iterable[str] = ()) -> list["AbsTask"]:
    """Return mteb's tasks with these names, and those of benchmarks such as `MIEB(lite)`.

    Raises:
        UserError: mteb is not installed, a name is unknown, or a task takes other inputs than images and texts. One
            message covers all of them.
    """
    mteb = _mteb()
    tasks: dict[str, AbsTask] = {}
    problems = []
    for name in names:
        try:
            tasks[name] = mteb.get_task(name)
        except KeyError:
            known = (task.metadata.name for task in importlib.import_module("mteb.get_tasks").TASK_LIST)
            problems.append(f"{name!r} is not a task of mteb.{did_you_mean(name, known)}")
    for name in benchmarks:
        try:
            tasks |= {task.metadata.name: task for task in mteb.get_benchmark(name).tasks}
        except KeyError:
            known = (benchmark.name for benchmark in mteb.get_benchmarks())
            problems.append(f"{name!r} is not a benchmark of mteb.{did_you_mean(name, known)}")
    for name, task in tasks.items():
        if others := sorted(set(task.metadata.modalities) - set(MODALITIES)):
            problems.append(f"{name!r} takes {' and '.join(others)}, expected images or texts.")
    if problems:
        raise UserError(f"{' '.join(problems)} `mteb available-tasks` lists the tasks.")
    return list(tasks.values())


@dataclass(frozen=True)
class Results:
    """The outcome of a run of mteb.

    Attributes:
        scores: The name of each task, the name of its main score, and that score as mteb states it, mostly in [0, 1].
        failures: Messages of the tasks that failed, by their names.
        folder: Folder of the result files.
    """

    scores: list[tuple[str, str, float]]
    failures: dict[str, str]
    folder: Path


def evaluate(model: MtebModel, tasks: Sequence["AbsTask"], out: Path, *, progress: bool = True) -> Results:
    """Run mteb's tasks with a run. Results of the same run that are in `out` already are kept.

    Args:
        model: The run.
        tasks: The tasks.
        out: Folder of mteb's result files, in subfolders for model and revision.
        progress: Show progress bars.

    Raises:
        UserError: mteb is not installed, or `out` cannot be written.
    """
    mteb, meta = _mteb(), model.mteb_model_meta
    main = {task.metadata.name: task.metadata.main_score for task in tasks}
    with report_write_errors(out):
        cache = mteb.ResultCache(out)
        found: ModelResult = mteb.evaluate(
            model,
            list(tasks),
            cache=cache,
            encode_kwargs={"batch_size": BATCH, "show_progress_bar": progress},
            raise_error=False,
            co2_tracker=False,
            show_progress_bar=progress,
        )
    scores = [(each.task_name, main[each.task_name], each.get_score()) for each in found.task_results]
    failures = {each.task_name: " ".join(each.exception.split())[:300] for each in found.exceptions or []}
    return Results(scores, failures, Path(cache.get_task_result_path("_", meta)).parent)


def _mteb() -> Any:
    return import_extra("mteb", "mteb is not installed. Install it with: pip install 'sail-align[mteb]'.")


def _unit_rows(embeddings: Any) -> torch.Tensor:
    rows_NE = torch.as_tensor(embeddings, dtype=torch.float32)
    return torch.nn.functional.normalize(rows_NE if rows_NE.ndim > 1 else rows_NE[None], dim=-1)
