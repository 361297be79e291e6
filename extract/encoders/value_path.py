"""Patches without the last attention: what each patch says itself, as MaskCLIP reads a vision transformer.

Zhou, Loy and Dai 2022, "Extract Free Dense Labels from CLIP", section 3.2: in the last block a patch attends to nothing
but itself, so that what goes on is its own value, projected; the block's other parts and the last norm stay. The class
token and registers attend as always, so that the picture's own feature does not change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_VALUES, _OUT = ("v_proj", "qkv"), ("o_proj", "proj")


class NoValuePathError(Exception):
    """The last attention's values cannot be told from its output, or it does not see all patches at once."""


@contextmanager
def values_of_patches(network: nn.Module, patches: int) -> Iterator[None]:
    """Let the last `patches` tokens skip the attention of the network's last block.

    Raises:
        NoValuePathError: The network has no such path.
    """
    into_values, out = _last_attention(network)
    values: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        values.append(output[..., -out.in_features :])  # of queries, keys and values in one, the last third

    def replace(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        if inputs[0].ndim != 3 or inputs[0].shape[1] < patches or not values:
            raise NoValuePathError
        mixed_BTD = inputs[0].clone()
        mixed_BTD[:, -patches:] = values.pop()[:, -patches:]
        return (mixed_BTD,)

    hooks = [into_values.register_forward_hook(keep), out.register_forward_pre_hook(replace)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _last_attention(network: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """Return the last attention's projections to values and out of its heads, if nothing stands between them."""
    for module in reversed(list(network.modules())):
        into, out = (next((getattr(module, n) for n in names if hasattr(module, n)), None) for names in (_VALUES, _OUT))
        if isinstance(into, nn.Linear) and isinstance(out, nn.Linear):
            bare = isinstance(getattr(module, "norm", nn.Identity()), nn.Identity)
            ungated = getattr(module, "gate", None) is None
            if bare and ungated and into.out_features in (out.in_features, 3 * out.in_features):
                return into, out
            break
    raise NoValuePathError
