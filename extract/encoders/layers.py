"""Features of intermediate layers: the states after a block of a network, pooled like its output.

Layer −1 is the output of the network, with all that follows its last block. Layer −k is the state after the k-th last
block, after the network's final norm if there is one, as in DINOv2's `get_intermediate_layers` and in transformers'
backbones.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from sail_align.extract.encoders.identity import LAST_LAYER, MOST_LAYERS
from sail_align.extract.errors import UserError

OUTPUT = (LAST_LAYER,)
"""The only layer of an encoder unless others are chosen."""


def parse_layers(text: str, option: str = "--layers") -> tuple[int, ...]:
    """Return layers such as `-1,-4`. Raises `UserError` unless they are different negative numbers."""
    try:
        layers = tuple(int(each) for each in text.split(","))
    except ValueError:
        layers = ()
    if not layers or len(set(layers)) < len(layers) or not all(-MOST_LAYERS <= layer < 0 for layer in layers):
        raise UserError(
            f"{option} is invalid: got {text[:80]!r}, expected different layers counted from the end, such as -1,-4."
        )
    return layers


def layer_id(network: str, layer: int) -> str:
    """Return the id of the encoder that a layer of a network is."""
    return network if layer == LAST_LAYER else f"{network}@{layer}"


def require_depth(layers: Sequence[int], depth: int, network: str) -> None:
    """Raise `UserError` if a network of this depth lacks a layer."""
    if (lowest := min(layers)) < -depth:
        raise UserError(f"{network} has no layer {lowest}: it has {depth} layers. Choose from −1 to −{depth}.")


def refuse_layers(layers: Sequence[int], network: str) -> None:
    """Raise `UserError` if other layers than the output are chosen."""
    if tuple(layers) != OUTPUT:
        raise UserError(f"Encoder {network!r} has no intermediate layers to store. Leave --layers out.")


def final_norm(network: nn.Module, run: Callable[[], Tensor]) -> nn.Module | None:
    """Return the norm outside all blocks whose output is that of the network; None if there is none.

    Args:
        network: The network.
        run: Runs the network on any input and returns its output.
    """
    outputs: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, _inputs: object, output: Any) -> None:
        outputs[module] = output

    in_block = {each for stack in block_stacks(network) for block in stack for each in block.modules()}
    norms = [each for each in network.modules() if "Norm" in type(each).__name__ and each not in in_block]
    handles = [each.register_forward_hook(keep) for each in norms]
    try:
        with torch.inference_mode():
            last = run()
    finally:
        for handle in handles:
            handle.remove()
    return next((each for each in norms if each in outputs and outputs[each] is last), None)


def block_stacks(network: nn.Module) -> list[nn.ModuleList | nn.Sequential]:
    """Return the lists of modules in a network, those within blocks as well."""
    return [each for each in network.modules() if _is_stack(each)]


def _is_stack(module: object) -> TypeGuard[nn.ModuleList | nn.Sequential]:
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0


class TransformersLayers:
    """The layers of a model of transformers that returns `hidden_states`.

    Attributes:
        depth: Number of blocks.
    """

    def __init__(self, model: nn.Module, name: str, **inputs: Any):
        """Run the model once.

        Args:
            model: The model.
            name: Name for messages.
            inputs: Any input of the model.

        Raises:
            UserError: The model does not return its hidden states.
        """
        self._model = model
        self._norm = final_norm(model, lambda: model(**inputs).last_hidden_state)
        with torch.inference_mode():
            states = getattr(model(**inputs, output_hidden_states=True), "hidden_states", None) or ()
        if len(states) < 2:
            refuse_layers((), name)
        self.depth = len(states) - 1

    def states(self, layers: Sequence[int], **inputs: Any) -> list[Tensor]:
        """Return the states of layers, (B, T, D) or (B, D, h, w)."""
        output = self._model(**inputs, output_hidden_states=True)
        chosen = []
        for layer in layers:
            state: Tensor = output.last_hidden_state if layer == LAST_LAYER else output.hidden_states[layer]
            state = state.to(output.last_hidden_state.device)  # blocks may be spread over several
            chosen.append(self._norm(state) if self._norm and layer != LAST_LAYER else state)
        return chosen


class BlockLayers:
    """The layers of a network of timm, read where its blocks or stages end.

    Attributes:
        depth: Number of blocks or stages. The convolution after the stages of an EfficientNet counts as one more.
    """

    def __init__(self, model: Any, name: str, pixels_BCHW: Tensor):
        """Find the blocks.

        Raises:
            UserError: The network has no blocks that are known.
        """
        self._model = model
        stacks = (getattr(model, each, None) for each in ("blocks", "stages", "layers"))
        blocks: list[nn.Module] = next((list(stack) for stack in stacks if _is_stack(stack)), [])
        self._blocks = blocks if hasattr(model, "conv_head") else blocks[:-1]
        if not self._blocks:
            refuse_layers((), name)
        self.depth = len(self._blocks) + 1
        self._norm = final_norm(model, lambda: model.forward_features(pixels_BCHW))

    def states(self, layers: Sequence[int], pixels_BCHW: Tensor) -> list[Tensor]:
        """Return the states of layers, in the form of `forward_features`."""
        found: dict[int, Tensor] = {}

        def keeper(layer: int) -> Callable[[nn.Module, object, Tensor], None]:
            return lambda _module, _inputs, output: found.__setitem__(layer, output)

        inner = [layer for layer in layers if layer != LAST_LAYER]
        handles = [self._blocks[layer + 1].register_forward_hook(keeper(layer)) for layer in inner]
        try:
            found[LAST_LAYER] = self._model.forward_features(pixels_BCHW)
        finally:
            for handle in handles:
                handle.remove()
        states = [found[layer].to(found[LAST_LAYER].device) for layer in layers]  # blocks may be spread over several
        return [
            state if layer == LAST_LAYER else self._normed(state) for layer, state in zip(layers, states, strict=True)
        ]

    def _normed(self, state: Tensor) -> Tensor:
        norm: Any = self._norm
        fits = norm is not None and tuple(getattr(norm, "normalized_shape", ())) == state.shape[-1:]
        normed: Tensor = norm(state) if fits else state  # a hierarchy's norm is for the width of its last stage
        return normed
