"""Exact nearest-code search that never holds an N x K matrix.

The public VQGAN implementations write all N x K distances to memory (26 GB for 65,536 latents and 100,000 codes). Here
only one tile of distances is in memory at a time, so the extra memory is O(N + K) plus small tiles. There is one
interface and an engine for each kind of device (`engine_name`):

- CPU: faiss's exhaustive search (`exhaustive.nearest_faiss`);
- NVIDIA GPUs with bfloat16 tensor cores: a bfloat16 screen and a float32 decision (`screening.nearest_screened`);
- others: tiles of 1024 x 8192 distances (`exhaustive.nearest_tiles`).

Shapes: N vectors, K codes, D dimensions; G groups, each searched in its own codebook.
"""

from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from vqpipe.errors import ConfigError, DataError, NumericError
from vqpipe.search.exhaustive import nearest_faiss, nearest_tiles

Metric = Literal["l2", "cosine"]
Engine = Literal["faiss", "triton", "torch tiles"]

LARGEST = 1e15
"""Sums of squares of larger numbers over a codebook may overflow float32."""
SAMPLED = 256
"""Number of evenly spaced codes, from which the mean of a codebook is estimated."""
FAR_SHARE = 0.99
"""Share of the codes' root mean square: a mean above it is subtracted to preserve float32 precision."""


@torch.no_grad()
def nearest(vectors: Tensor, codes: Tensor, metric: Metric = "l2", *, check: bool = True) -> Tensor:
    """The id of each vector's nearest code by exhaustive search, in float32 under any autocast.

    Of equally near codes the lowest id wins. Distances are float32: codes whose distances differ by less than the
    rounding of |vector - code|^2 + |vector|^2 count as equally near, and either may win.

    Args:
        vectors: float[N, D], any floating type; N may be 0. Or float[G, N, D], with separate codes for each group.
        codes: float[K, D] on the same device, K >= 1. Or float[G, K, D].
        metric: "l2", or "cosine": l2 between vectors scaled to unit length. A zero vector is equally near to every
            code, so it gets id 0.
        check: raise an error for invalid numbers. Without, a vector that is not finite gets some id in [0, K), a zero
            code stays zero under "cosine", and a GPU is not synchronized: for training, where the loss shows it later.

    Returns:
        int64[N] (or int64[G, N]) on the vectors' device.

    Raises:
        NumericError: a NaN, an infinity or a number too large to square; under "cosine" also a code that is zero.
        DataError: shapes that do not fit each other.
        ConfigError: another metric.
    """
    if metric not in get_args(Metric):
        raise ConfigError(f"unknown metric {metric!r}", 'Use "l2" or "cosine"')
    check_shapes(vectors, codes)
    vectors, codes = vectors.detach(), codes.detach()
    if torch.compiler.is_compiling() or isinstance(vectors, FakeTensor):
        return nearest_operator(vectors, codes, metric, check)
    with torch.autocast(vectors.device.type, enabled=False):
        if vectors.ndim == 3:
            return nearest_of_groups(vectors.float(), codes.float(), metric, check)
        return nearest_of_groups(vectors.float()[None], codes.float()[None], metric, check)[0]


@torch.library.custom_op("vqpipe::nearest", mutates_args=())
def nearest_operator(vectors: Tensor, codes: Tensor, metric: str, check: bool) -> Tensor:
    """`nearest` as one operator in a graph of torch.compile, which cannot trace faiss, NumPy and Triton kernels."""
    return nearest(vectors, codes, metric, check=check)  # type: ignore[arg-type]  # operators take no Literal


@nearest_operator.register_fake
def _(vectors: Tensor, codes: Tensor, metric: str, check: bool) -> Tensor:
    return torch.empty(vectors.shape[:-1], dtype=torch.int64, device=vectors.device)


def engine_name(device: torch.device) -> Engine:
    """The engine on `device`: faiss on the CPU; Triton with bfloat16 tensor cores; otherwise torch tiles."""
    if device.type == "cpu":
        return "faiss"
    screens = device.type == "cuda" and torch.version.hip is None and find_spec("triton") is not None
    return "triton" if screens and torch.cuda.get_device_capability(device) >= (8, 0) else "torch tiles"


def nearest_of_groups(vectors: Tensor, codes: Tensor, metric: Metric, check: bool) -> Tensor:
    """float32[G, N, D], float32[G, K, D] -> int64[G, N]."""
    if vectors.numel() == 0:
        return torch.empty(vectors.shape[:2], dtype=torch.int64, device=vectors.device)
    if check:
        check_finite(vectors, codes, metric)
    without_direction = None
    if metric == "cosine":
        without_direction = ~vectors.any(dim=2)
        vectors, codes = unit_rows(vectors), unit_rows(codes)
    offsets = far_offsets(codes)
    if offsets is not None:
        vectors, codes = vectors - offsets, codes - offsets
    engine = engine_name(vectors.device)
    if engine == "triton":
        from vqpipe.search.screening import nearest_screened  # needs Triton, which is not available everywhere

        ids = nearest_screened(vectors.contiguous(), codes.contiguous())
    else:
        search = nearest_faiss if engine == "faiss" else nearest_tiles
        pairs = zip(vectors, codes, strict=True)
        found = [search(rows.contiguous(), group_codes.contiguous()) for rows, group_codes in pairs]
        ids = found[0][None] if len(found) == 1 else torch.stack(found)
    return ids if without_direction is None else ids.masked_fill_(without_direction, 0)


def unit_rows(rows: Tensor) -> Tensor:
    """Scale the rows of float32[..., D] to unit length, however short they are; those without a direction become zero.

    They are multiplied by a power of two first, which is exact, so that squares neither underflow nor overflow.
    """
    exponents = torch.log2(rows.abs().amax(dim=-1, keepdim=True)).floor().clamp(-126, 126)
    return F.normalize(rows * torch.exp2(-exponents), dim=-1, eps=0.0).nan_to_num_()


def far_offsets(codes: Tensor) -> Tensor | None:
    """The offset float32[G, 1, D] to subtract from vectors and codes, float32[G, K, D], of groups whose mean is large
    compared with their spread (zero for other groups); on the CPU None if there is no such group.

    |v|^2 + |c|^2 - 2 v.c loses the digits of |c|^2. The offset is rounded to a multiple of a power of two of the
    spread's size, so subtracting it is exact and ties stay ties.
    """
    some = codes[:, :: -(-codes.shape[1] // SAMPLED)]
    means = some.mean(dim=1, keepdim=True)
    far = means.square().sum(dim=(1, 2)) > FAR_SHARE**2 * some.square().sum(dim=(1, 2)) / some.shape[1]
    if some.device.type == "cpu" and not far.any():  # a GPU would be synchronized
        return None
    spreads = (some - means).abs().amax(dim=(1, 2))
    steps = torch.exp2(torch.floor(torch.log2(spreads)))[:, None, None]
    return torch.where((far & (spreads > 0))[:, None, None], torch.round(means / steps) * steps, 0.0)


def check_shapes(vectors: Tensor, codes: Tensor) -> None:
    grouped = vectors.ndim == 3
    fit = vectors.ndim == codes.ndim and vectors.ndim in (2, 3) and vectors.shape[-1] == codes.shape[-1] > 0
    if not fit or (grouped and len(vectors) != len(codes)):
        raise DataError(
            f"vectors {list(vectors.shape)} and codes {list(codes.shape)} do not fit",
            "Both are [rows, dimensions], or [groups, rows, dimensions], with the same number of dimensions",
        )
    if codes.shape[-2] == 0:
        raise DataError("an empty codebook has no nearest code", "Give at least one code")
    if vectors.device != codes.device:
        raise DataError(f"vectors are on {vectors.device}, codes on {codes.device}", "Move both to one device")


def check_finite(vectors: Tensor, codes: Tensor, metric: Metric) -> None:
    """Raise a NumericError for numbers that have no nearest code. A valid input synchronizes the device once."""
    extremes = torch.stack([*torch.aminmax(vectors), *torch.aminmax(codes)])  # propagates NaN, without a mask
    zeros = (~codes.any(dim=2)).sum() if metric == "cosine" else extremes.new_zeros(())
    low, high, code_low, code_high, zero = torch.stack([*extremes, zeros.float()]).tolist()
    for name, values, fine in (
        ("vectors", vectors, low >= -LARGEST and high <= LARGEST),
        ("codes", codes, code_low >= -LARGEST and code_high <= LARGEST),
    ):
        if not fine:
            bad = (~(values.abs() <= LARGEST)).any(dim=2).flatten()
            raise NumericError(
                f"{int(bad.sum())} of {len(bad)} {name} hold NaN, infinity or numbers beyond {LARGEST:g}"
                f" (first: row {int(bad.nonzero()[0])})",
                "Check their source: a diverged training run, or float16 overflow",
            )
    if zero:
        bad = ~codes.any(dim=2).flatten()
        raise NumericError(
            f"{int(bad.sum())} of {len(bad)} codes are zero (first: {int(bad.nonzero()[0])}) and have no direction",
            "Use the l2 metric, or a codebook without zero codes",
        )
