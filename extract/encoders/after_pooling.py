"""Modules of sentence-transformers after the pooling: Dense, LayerNorm, Normalize and Dropout."""

from collections.abc import Callable, Mapping
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from sail_align.extract.encoders.weights import EncoderFiles
from sail_align.extract.errors import UserError


class NotSupportedError(Exception):
    """A setting of a module has no counterpart here. The arguments are what was found, and what was expected."""


def read_after(kind: str, files: EncoderFiles, path: str) -> tuple[nn.Module, str]:
    """Load a module of a repository, and return it with its name and settings for the spec.

    Args:
        kind: Name of its class in sentence-transformers.
        files: The repository.
        path: Folder of the module.

    Raises:
        NotSupportedError: The module or one of its settings has no counterpart here.
        UserError: Its config or weights are missing or do not match.
    """
    if kind not in _READERS:
        raise NotSupportedError(f"{kind} comes after Pooling", f"one of {', '.join(_READERS)}")
    return _READERS[kind](files, path)


class AfterPooling(nn.Sequential):
    """The modules after the pooling, each in the precision of its weights."""

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Return the features of pooled token states."""
        for module in self:
            weight = next(module.parameters(), None)
            pooled_BD = module(pooled_BD if weight is None else pooled_BD.to(weight.dtype))
        return pooled_BD


def module_config(files: EncoderFiles, path: str) -> dict[str, Any]:
    """Return the `config.json` of a module, empty if it has none."""
    folder = files.path / path
    return EncoderFiles.read_json(folder, "config.json") if (folder / "config.json").is_file() else {}


def _tensors(files: EncoderFiles, path: str) -> dict[str, Tensor]:
    weights = files.path / path / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights} is missing, and pickled weights are not loaded. Convert them to safetensors.")
    return load_file(weights)


def _load(module: nn.Module, files: EncoderFiles, path: str) -> None:
    try:
        module.load_state_dict(_tensors(files, path))
    except RuntimeError as problem:
        raise UserError(f"The weights in {files.path / path} do not match its config. {problem}") from problem


class _Dense(nn.Module):
    """A linear layer with an activation, and perhaps its input added."""

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: nn.Module, use_residual: bool):
        super().__init__()
        self.linear, self.activation, self.use_residual = (
            nn.Linear(inputs, outputs, bias=bias),
            activation,
            use_residual,
        )
        if use_residual and inputs != outputs:
            self.residual = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        out_BE: Tensor = self.activation(self.linear(x_BD))
        if not self.use_residual:
            return out_BE
        return out_BE + (self.residual(x_BD) if hasattr(self, "residual") else x_BD)


class _Normalize(nn.Module):
    """Division of each vector by its length."""

    def forward(self, x_BD: Tensor) -> Tensor:
        return nn.functional.normalize(x_BD, dim=-1)


class _LayerNorm(nn.Module):
    """A layer norm under the library's names of tensors."""

    def __init__(self, dimension: int):
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    def forward(self, x_BD: Tensor) -> Tensor:
        out_BD: Tensor = self.norm(x_BD)
        return out_BD


def _read_dense(files: EncoderFiles, path: str) -> tuple[nn.Module, str]:
    config = module_config(files, path)
    _require_pooled(files, config)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    package, _, name = activation.rpartition(".")
    found = getattr(nn, name, None) if package.startswith("torch.nn") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise NotSupportedError(f"{path} has the activation {activation}", "one of torch.nn")
    sizes = [int(config[key]) for key in ("in_features", "out_features") if key in config]
    if len(sizes) != 2:
        raise UserError(f"{files.path / path}/config.json is invalid: expected in_features and out_features.")
    use_residual = bool(config.get("use_residual"))
    module = _Dense(sizes[0], sizes[1], bool(config.get("bias", True)), found(), use_residual)
    _load(module, files, path)
    return module, f"Dense({name}{', residual' if use_residual else ''})"


def _read_normalize(files: EncoderFiles, path: str) -> tuple[nn.Module, str]:
    _require_pooled(files, module_config(files, path) if path else {})
    return _Normalize(), "Normalize"


def _read_layer_norm(files: EncoderFiles, path: str) -> tuple[nn.Module, str]:
    module = _LayerNorm(int(module_config(files, path).get("dimension", 1)))
    _load(module, files, path)
    return module, "LayerNorm"


def _require_pooled(files: EncoderFiles, config: Mapping[str, Any]) -> None:
    for key in ("module_input_name", "module_output_name"):
        if (name := config.get(key) or "sentence_embedding") != "sentence_embedding":
            raise NotSupportedError(f"a module has the {key} {name!r}", "sentence_embedding")


_READERS: dict[str, Callable[[EncoderFiles, str], tuple[nn.Module, str]]] = {
    "Dense": _read_dense,
    "Normalize": _read_normalize,
    "LayerNorm": _read_layer_norm,
    "Dropout": lambda files, path: (nn.Identity(), "Dropout"),
}
