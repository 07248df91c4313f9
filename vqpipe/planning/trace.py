"""The memory and the operations of a step, without a device and without allocating: the step runs on fake tensors.

PyTorch's FakeTensorMode runs the code of a step with tensors that have a shape, a type and a storage of some size, but
no data. `Trace` sees every operation of it, forward and backward, and counts

- memory: a new storage is added when an operation returns it, and subtracted when the last tensor that uses it is
  gone. So what autograd saves for the backward pass is counted for as long as it is saved;
- floating-point operations, by the formulas of PyTorch's flop counter (`torch.utils.flop_counter`), and the bytes that
  each operation reads and writes.

What PyTorch does inside of one operation is not seen: workspaces of cuDNN and cuBLAS, copies into another layout.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vqpipe.search.blocking import CAPACITY, ROWS_AT_ONCE, Blocking
from vqpipe.search.nearest import nearest_operator

ACTIVATIONS, SEARCH, GRADIENTS, OPTIMIZER, HEAP = "activations", "search", "gradients", "optimizer", "heap"
"""Parts of the memory. Others are named by those who build a network: weights, codebook, discriminator, LPIPS."""
HEAP_SHARE, HEAP_LIMIT = 0.3, 32 * 2**20
"""On a CPU, the gaps in the heap of glibc, from which tensors below this many bytes are allocated (its mmap threshold
rises to that), as a share of those that come and go: measured on training steps of three presets."""
PROCESSORS = 132
"""Multiprocessors of the GPU that searches: those of an H100."""
EPILOGUE_DIMENSIONS = 64
"""Comparing two distances costs as much as a product of this many dimensions."""

NEAREST = nearest_operator._opoverload
FREE = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.empty_like.default}
"""Operations that move no data, besides views."""


class Operation(NamedTuple):
    """What one operation computes and moves."""

    flops: float
    bytes: float
    kind: str
    """Arithmetic of its products: "bf16", "conv32" (a convolution in float32) or "fp32"."""
    backward: bool
    part: str


class Trace(TorchDispatchMode):
    """Counts what runs under it. Enter it inside of a FakeTensorMode.

    Args:
        gpu: whether the search is that of a GPU, which needs memory for its candidates.
    """

    def __init__(self, *, gpu: bool) -> None:
        super().__init__()
        self.gpu = gpu
        self.part = ACTIVATIONS
        """The part that new storages belong to."""
        self.live: Counter[str] = Counter()
        """Bytes in memory now, by part."""
        self.peak: dict[str, int] = {}
        """The same at the moment when most bytes were in memory."""
        self.operations: list[Operation] = []
        self.storages: dict[int, list[Any]] = {}  # address of a storage -> its bytes, its part, and gaps beside it

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "prim":  # properties of a tensor, such as its device
            return function(*args, **kwargs)
        if function is torch.ops.aten._unique2.default:  # at most as many distinct ids as there are ids
            ids = args[0].flatten()
            return ids, torch.empty_like(args[0]), torch.empty_like(ids)
        result = function(*args, **kwargs)
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        for tensor in outputs:
            self.add(tensor)
        if not function.is_view and function not in FREE:
            inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            self.count(function, args, kwargs, result, inputs, outputs)
        return result

    def count(
        self, function: Any, args: Any, kwargs: Any, result: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Append the operation."""
        moved = sum(each.nbytes for each in (*inputs, *outputs))
        backward = torch._C._current_autograd_node() is not None
        if function is NEAREST:
            vectors, codes = inputs
            dim = vectors.shape[-1]
            flops = 2.0 * vectors.numel() // dim * codes.shape[-2] * max(dim, EPILOGUE_DIMENSIONS if self.gpu else 8)
            with self.inside(SEARCH, search_bytes(vectors, codes) if self.gpu else 0):
                pass
            self.operations.append(Operation(flops, moved, "bf16" if self.gpu else "fp32", False, SEARCH))
            return
        formula = flop_registry.get(function._overloadpacket)
        flops = float(formula(*args, **kwargs, out_val=result)) if formula else 0.0
        kind = "fp32"
        if flops and any(each.dtype in (torch.bfloat16, torch.float16) for each in inputs):
            kind = "bf16"
        elif flops and "convolution" in str(function):
            kind = "conv32"
            if not self.gpu:  # oneDNN computes on copies in a layout of its own
                with self.inside(self.part, moved):
                    pass
        self.operations.append(Operation(flops, moved, kind, backward, self.part))

    def add(self, tensor: Tensor, part: str = "") -> None:
        """Count the storage of a tensor from now on, unless it is counted already; with `part` it is one that
        stays, and belongs to that part."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self.storages.get(address)
        if known is None:
            size = storage.nbytes()
            gaps = 0 if part or self.part == OPTIMIZER else self.gaps(size)
            self.storages[address] = [size, part or self.part, gaps]
            weakref.finalize(storage, self.free, address)
            self.live[part or self.part] += size
            self.live[HEAP] += gaps
            self.compare()
        elif part:  # it stays
            self.live[known[1]] -= known[0]
            self.live[part] += known[0]
            self.live[HEAP] -= known[2]
            known[1:] = [part, 0]

    def free(self, address: int) -> None:
        size, part, gaps = self.storages.pop(address)
        self.live[part] -= size
        self.live[HEAP] -= gaps

    def gaps(self, size: int) -> int:
        """The gaps that an allocation of `size` bytes leaves in the heap."""
        return 0 if self.gpu or size >= HEAP_LIMIT else int(HEAP_SHARE * size)

    def compare(self) -> None:
        """Keep what is in memory now if it is more than ever before."""
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)

    @contextmanager
    def inside(self, part: str, extra: int = 0) -> Iterator[None]:
        """Around code whose tensors belong to `part`, and which needs `extra` bytes that are not tensors."""
        before, self.part = self.part, part
        self.live[part] += extra
        self.live[HEAP] += self.gaps(extra)
        self.compare()
        yield
        self.live[part] -= extra
        self.live[HEAP] -= self.gaps(extra)
        self.part = before

    def own(self, network: nn.Module, part: str) -> None:
        """Count the weights of a network as `part`, and their gradients as such."""
        self.own_tensors(network, part)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.own_gradient)

    def own_tensors(self, network: nn.Module, part: str) -> None:
        """Count the weights and buffers of a network as `part`."""
        for tensor in (*network.parameters(), *network.buffers()):
            self.add(tensor, part)

    def own_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.add(parameter.grad, GRADIENTS)

    def count_calls(self, owner: nn.Module | torch.optim.Optimizer, method: str, part: str) -> None:
        """Count what a method computes, such as "forward", and the tensors that it makes, as `part`."""
        call = getattr(owner, method)

        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.inside(part):
                return call(*args, **kwargs)

        setattr(owner, method, inside)


def search_bytes(vectors: Tensor, codes: Tensor) -> int:
    """Memory of the search on a GPU besides its result: candidates of each vector, both sides in bfloat16."""
    groups = vectors.shape[0] if vectors.ndim == 3 else 1
    count, codes_count, dim = min(vectors.shape[-2], ROWS_AT_ONCE), codes.shape[-2], vectors.shape[-1]
    blocking = Blocking.of(groups, count, codes_count, dim, PROCESSORS)
    candidates = groups * count * blocking.splits * (8 + 8 * CAPACITY)
    return candidates + groups * (count + codes_count) * (2 * blocking.padded + 4 * dim + 16)


class CudaAutocast:
    """The norms and the softmax of autocast on CUDA, which compute in float32; on a CPU autocast leaves them alone.

    The functions are replaced, since activation checkpointing calls them again in the backward pass, where a
    TorchFunctionMode is not active.
    """

    NAMES = ("group_norm", "layer_norm", "softmax")

    def __enter__(self) -> None:
        self.before = [(module, name, getattr(module, name)) for module in (F, torch) for name in self.NAMES]
        for module, name, function in self.before:
            setattr(module, name, self.wide(function))

    def __exit__(self, *error: object) -> None:
        for module, name, function in self.before:
            setattr(module, name, function)

    @staticmethod
    def wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, in float32 under autocast."""

        def in_float32(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return function(input.float() if torch.is_autocast_enabled("cpu") else input, *args, **kwargs)

        return in_float32
