"""A GPU that computes nothing, for tests of devices and dtypes on machines without one.

Tensors on it have shapes, dtypes and a device, but no values; those on the CPU are real. An operation on tensors of
both is an error, as on a GPU. PyTorch's `FakeTensorMode` checks that. This module adds what it lacks without a driver:
copies to and from the CPU, and a backward pass.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_streams import Streams
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda:0")
GB = 10**9

ENGINE = torch.autograd.backward, torch.autograd.grad
aten = torch.ops.aten
COPIES = {aten._to_copy.default: 0, aten.copy_.default: 1}
"""Operations that copy, and which of their arguments they copy from."""


class FakeCard(TorchDispatchMode):
    """The GPU.

    Attributes:
        streams: Its streams, and copies in flight.
        transfers: Operations that waited for the GPU to send values to the CPU, which are all 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.streams = Streams()
        self.transfers: list[str] = []
        self._fakes = FakeTensorMode(allow_fallback_kernels=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        pinned = kwargs.pop("pin_memory", False)
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        on_card = [each for each in tensors if isinstance(each, FakeTensor)]
        device = torch.device(kwargs.get("device") or "cpu")
        if not on_card and device.type != "cuda":
            made = func(*args, **kwargs)
            return self.streams.pin(made) if pinned else made
        for tensor in on_card:
            self.streams.use(tensor)
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            self._wait(func)
            return False if func is aten.equal.default else torch.ones((), dtype=tensors[0].dtype).item()
        if func not in COPIES:
            return self._compute(func, args, kwargs)
        source = args[COPIES[func]]
        asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if not isinstance(source, FakeTensor):
            made = self._compute(func, args, kwargs)
            if asynchronous and self.streams.is_pinned(source):
                self.streams.upload(source, made)
            return made
        to_cpu = device.type == "cpu" if "device" in kwargs else not isinstance(args[0], FakeTensor)
        if not to_cpu:
            return self._compute(func, args, kwargs)
        target = (
            args[0]
            if func is aten.copy_.default
            else torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        )
        if asynchronous and (target is not args[0] or self.streams.is_pinned(target)):
            return self.streams.download(target)
        self._wait(func)
        return target.fill_(1)

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self._fakes:
            return func(*tree_map_only(Tensor, self._fake, args), **tree_map_only(Tensor, self._fake, kwargs))

    def _wait(self, func: Any) -> None:
        """Wait for the current stream."""
        self.transfers.append(str(func))
        self.streams.current.synchronize()

    def _fake(self, tensor: Tensor) -> Tensor:
        """Return a tensor without values. It is new, because a fake keeps a weak reference to what it was made from."""
        if isinstance(tensor, FakeTensor):
            return tensor
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


@contextmanager
def fake_cuda(free: int = 80 * GB) -> Iterator[FakeCard]:
    """Let PyTorch believe that there is a GPU with so many free bytes."""
    with pytest.MonkeyPatch.context() as patch:
        card = FakeCard()  # imports much of PyTorch, which asks for GPUs
        patch.setattr(FakeTensorMode, "avoid_device_init", True)
        patch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, free))
        patch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda device=None: 0)
        card.streams.install(patch)
        patch.setattr(torch.autograd, "backward", backward)
        patch.setattr(torch.autograd, "grad", grad)
        torch._C._ensureCUDADeviceGuardSet()
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with card:
                yield card
            card.streams.end()
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)


def backward(roots: Any, gradients: Any = None, *_: Any, **options: Any) -> None:
    """Replace `torch.autograd.backward`."""
    roots, gradients = (
        each if isinstance(each, Sequence) and not isinstance(each, GradientEdge) else [each]
        for each in (roots, gradients)
    )
    if not any(isinstance(each, FakeTensor) for each in (*roots, *gradients)):
        ENGINE[0](roots, None if gradients == [None] else gradients, *_, **options)
        return
    edges = [each if isinstance(each, GradientEdge) else get_gradient_edge(each) for each in roots]
    gradients = [torch.ones_like(root) if each is None else each for root, each in zip(roots, gradients, strict=True)]
    _run([(edge.node, edge.output_nr, gradient) for edge, gradient in zip(edges, gradients, strict=True)], {})


def grad(output: Any, inputs: Sequence[Tensor], *_: Any, materialize_grads: bool = False, **options: Any) -> Any:
    """Replace `torch.autograd.grad`."""
    if not isinstance(output, FakeTensor):
        return ENGINE[1](output, inputs, *_, materialize_grads=materialize_grads, **options)
    edges = [get_gradient_edge(each) for each in inputs]
    wanted = {(edge.node, edge.output_nr): None for edge in edges}
    root = get_gradient_edge(output)
    _run([(root.node, root.output_nr, torch.ones_like(output))], wanted)
    found = [wanted[edge.node, edge.output_nr] for edge in edges]
    return [torch.zeros_like(each) if value is None else value for each, value in zip(inputs, found, strict=True)]


def _run(roots: Sequence[tuple[Any, int, Tensor]], wanted: dict[tuple[Any, int], Any]) -> None:
    """Run a graph backwards, as PyTorch's engine does, which asks the driver for streams.

    Args:
        roots: Nodes, numbers of their outputs and gradients.
        wanted: Gradients to catch, by node and output. All others are accumulated in leaves.
    """
    users: Counter[Any] = Counter()
    seen, stack = set(), [node for node, _, _ in roots]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            following = [each for each, _ in node.next_functions if each is not None]
            users.update(following)
            stack += following
    sums: dict[Any, dict[int, Tensor]] = {}

    def add(node: Any, number: int, gradient: Tensor | None) -> None:
        if gradient is not None:
            about = node._input_metadata[number]
            assert gradient.device == about.device or about.device.type == "meta", (node, gradient.device, about.device)
            so_far = sums.setdefault(node, {})
            gradient = gradient.sum_to_size(tuple(about.shape)).to(about.dtype)
            so_far[number] = so_far[number] + gradient if number in so_far else gradient

    for node, number, gradient in roots:
        add(node, number, gradient)
    ready = [node for node in dict.fromkeys(node for node, _, _ in roots) if not users[node]]
    while ready:
        node = ready.pop()
        given = sums.pop(node, {})
        caught = [(node, number) for number in given if (node, number) in wanted]
        for key in caught:
            wanted[key] = given[key[1]]
        following = [each for each in node.next_functions if each[0] is not None]
        results = _apply(node, given) if given and (following or not caught) else []
        for (after, number), result in zip(following, results or [None] * len(following), strict=True):
            add(after, number, result)
            users[after] -= 1
            if not users[after]:
                ready.append(after)


def _apply(node: Any, given: dict[int, Tensor]) -> list[Tensor | None]:
    """Run a node; return the gradients of those of its inputs that need one."""
    gradients = [given.get(number) for number in range(len(node._input_metadata))]
    with torch.no_grad():
        if hasattr(node, "needs_input_grad"):  # a `torch.autograd.Function`
            return [each for each, needed in zip(node.apply(*gradients), node.needs_input_grad, strict=True) if needed]
        results = node(*gradients)
    results = results if isinstance(results, tuple) else (results,)
    return [each for each, (after, _) in zip(results, node.next_functions, strict=True) if after is not None]
