"""The GPU search in Triton's interpreter against float64, for drawn shapes, types, strides and values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqpipe.search import nearest

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda rows: rows,
    "columns": lambda rows: rows.mT.contiguous().mT,
    "every second number": lambda rows: rows.repeat_interleave(2, dim=-1)[..., ::2],
    "within a larger matrix": lambda rows: torch.cat([rows, rows], dim=-1)[..., : rows.shape[-1]],
    "channels first": lambda rows: rows.movedim(-1, 0).contiguous().movedim(0, -1),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def searches(draw: st.DrawFn, most: int) -> dict[str, Any]:
    """Vectors and codes of some type and strides: [N, D] and [K, D], or [G, N, D] and [G, K, D]."""
    groups = draw(st.sampled_from([None, 1, 3]))
    count, dim = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 3, 7, 8, 16, 17, 31, 32, 33, 64, 65, 127]))
    k = draw(st.one_of(st.integers(1, 10), st.sampled_from([127, 128, 129, 255]), st.integers(1, most)))
    seed, whole = draw(st.integers(0, 2**31)), draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)
    scale, mean = draw(st.sampled_from([1.0, 1e-3, 50.0])), draw(st.sampled_from([0.0, 30.0]))

    def rows(number: int) -> Tensor:
        shape = [number, dim] if groups is None else [groups, number, dim]
        if whole:  # distances are exact, and many are equal
            values = torch.randint(-2, 3, shape, generator=generator).double()
        else:
            values = scale * (torch.randn(shape, generator=generator).double() + mean)
        return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](values.to(draw(st.sampled_from(DTYPES))))

    return {"vectors": rows(count), "codes": rows(k), "metric": draw(st.sampled_from(["l2", "cosine"])), "whole": whole}


def check(search: Callable[..., Tensor], vectors: Tensor, codes: Tensor, metric: str, whole: bool) -> None:
    """Each id is that of a nearest code; where distances are exact, of the first."""
    wide, table = vectors.float().double(), codes.float().double()
    if metric == "cosine":
        if not table.any(dim=-1).all():
            return  # refused
        wide, table = (torch.nn.functional.normalize(each, dim=-1, eps=0.0).nan_to_num() for each in (wide, table))
    ids = search(vectors, codes, metric)
    distances = (wide.unsqueeze(-2) - table.unsqueeze(-3)).square().sum(dim=-1)
    assert ids.shape == vectors.shape[:-1]
    assert ids.dtype == torch.int64
    if whole and metric == "l2":
        assert torch.equal(ids, distances.argmin(dim=-1))
        return
    excess = distances.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - distances.amin(dim=-1)
    largest = wide.square().sum(dim=-1) + table.square().sum(dim=-1).amax(dim=-1, keepdim=True)
    assert (excess <= 2**-20 * largest).all()


@pytest.fixture(scope="module")
def on_triton(interpreted: Callable[..., Any]) -> Callable[..., Tensor]:
    """`nearest` with the engine of GPUs, in Triton's interpreter."""
    code = "import sys, vqpipe.search; sys.modules['vqpipe.search.nearest'].engine_name = lambda device: 'triton'"
    interpreted(exec, code)
    return lambda *arguments: interpreted(nearest, *arguments)


@pytest.mark.parametrize(("examples", "most"), [(10, 300), pytest.param(300, 3000, marks=pytest.mark.slow)])
def test_ids_are_those_of_a_float64_search(on_triton: Callable[..., Tensor], examples: int, most: int) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(searches(most))
    def run(example: dict[str, Any]) -> None:
        check(on_triton, **example)

    run()
