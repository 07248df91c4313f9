"""The GPU search in Triton's interpreter: bounds, both kinds of candidates, compilation of the kernels."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: torch brings it on Linux alone")

import triton

from vqpipe.search import kernels, screening
from vqpipe.search.screening import CAPACITY, Blocking, nearest_screened, rescore, screen

Interpreted = Callable[..., Any]
BY_TILE, TILE_OF_ONE_SPLIT, BY_CODE, ONE_SPLIT = (
    Blocking(padded=16, chunk=16, rows=64, tile=32, candidate_size=32, splits=2),
    Blocking(padded=16, chunk=16, rows=64, tile=32, candidate_size=32, splits=1),
    Blocking(padded=128, chunk=64, rows=32, tile=32, candidate_size=1, splits=2),
    Blocking(padded=128, chunk=64, rows=32, tile=32, candidate_size=1, splits=1),
)


def distances(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Squared distances, float64[G, N, K]."""
    return (vectors.double()[:, :, None] - codes.double()[:, None]).square().sum(dim=3)


def prepared(codes: torch.Tensor, blocking: Blocking) -> tuple[torch.Tensor, ...]:
    rounded, errors, norms = screening.rounded(codes, blocking)
    largest = torch.stack([screening.largest_of_tiles(each, blocking.tile) for each in (errors, norms)], dim=2)
    return rounded, codes.square().sum(dim=2) / 2, largest


@pytest.mark.parametrize(("blocking", "dim"), [(BY_TILE, 8), (BY_TILE, 13), (BY_CODE, 100)])
def test_the_nearest_code_is_among_the_candidates(interpreted: Interpreted, blocking: Blocking, dim: int) -> None:
    torch.manual_seed(dim)
    vectors, codes = torch.randn(2, 70, dim), torch.randn(2, 300, dim)
    num_tiles = -(-300 // blocking.tile)
    upper, counts, candidates, lower = interpreted(screen, vectors, prepared(codes, blocking), num_tiles, blocking)
    assert counts.sum(dim=2).min() > 0
    assert counts.max() <= CAPACITY
    exact = distances(vectors, codes)
    lowest = (exact.amin(dim=2) - vectors.double().square().sum(dim=2)) / 2
    assert (upper.amin(dim=2) >= lowest).all()
    for group, row in [(0, 0), (0, 69), (1, 33)]:
        listed = []
        for split in range(blocking.splits):
            for number in range(counts[group, row, split]):
                first = int(candidates[group, row, split, number]) * blocking.candidate_size
                members = torch.arange(first, min(first + blocking.candidate_size, 300))
                scores = (exact[group, row, members] - vectors[group, row].double().square().sum()) / 2
                assert lower[group, row, split, number] <= scores.min()
                listed += members.tolist()
        assert int(exact[group, row].argmin()) in listed
        assert len(listed) < 300  # some codes are excluded


@pytest.mark.parametrize(
    ("blocking", "num_codes", "dim"),
    [(TILE_OF_ONE_SPLIT, 1100, 8), (BY_CODE, 200, 100), (ONE_SPLIT, CAPACITY + 1, 100)],
)
def test_a_vector_with_too_many_candidates_is_compared_with_all_codes(
    interpreted: Interpreted, blocking: Blocking, num_codes: int, dim: int
) -> None:
    torch.manual_seed(0)
    codes = torch.randn(1, 1, dim) + 1e-4 * torch.randn(1, num_codes, dim)  # all equal in bfloat16
    vectors = torch.cat([torch.randn(1, 2, dim), codes[:, -1:]], dim=1)
    num_tiles = -(-num_codes // blocking.tile)
    listed = interpreted(screen, vectors, prepared(codes, blocking), num_tiles, blocking)
    assert listed[1].amin() > CAPACITY
    ids = interpreted(rescore, vectors, codes, listed, num_tiles, blocking)
    exact = distances(vectors, codes)
    excess = exact.gather(2, ids[:, :, None])[:, :, 0] - exact.amin(dim=2)
    assert (excess <= 2**-22 * exact.amax(dim=2)).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e14])
def test_very_small_and_large_numbers(interpreted: Interpreted, scale: float) -> None:
    """At 1e-30 all squares underflow in float32, so the first code is taken."""
    torch.manual_seed(0)
    vectors, codes = torch.randn(1, 20, 8), torch.randn(1, 200, 8)
    ids = interpreted(nearest_screened, vectors * scale, codes * scale)
    expected = distances(vectors, codes).argmin(dim=2)
    assert torch.equal(ids, expected if scale > 1e-30 else torch.zeros_like(ids))


@pytest.mark.parametrize(("codes", "dim"), [(1500, 4), (1, 3), (128, 64), (129, 65), (2, 1024)])
def test_splits_partial_tiles_and_both_kinds_of_candidates(interpreted: Interpreted, codes: int, dim: int) -> None:
    torch.manual_seed(dim)
    vectors, table = torch.randn(1, 9, dim), torch.randn(1, codes, dim)
    ids = interpreted(nearest_screened, vectors, table)
    assert torch.equal(ids, distances(vectors, table).argmin(dim=2))


def test_blocking_covers_the_dimension_and_fills_the_gpu() -> None:
    for dim in (1, 8, 16, 17, 64, 65, 768, 1024):
        blocking = Blocking.of(1, 4096, 100_000, dim, processors=132)
        assert blocking.padded >= dim
        assert blocking.padded % blocking.chunk == 0
        assert blocking.splits * -(-4096 // blocking.rows) >= 132
    assert Blocking.of(8, 65_536, 8192, 8, processors=132).splits == 1


SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""KiB of shared memory that a program may have, by compute capability (CUDA C++ Programming Guide)."""


COMPILED = [(86, 8), (86, 64), (86, 768), (80, 768), (90, 64), (100, 64)]
"""Each kind of matrix product, each kind of blocking, and the least shared memory."""
OTHERS = [
    (capability, dim) for capability in SHARED_MEMORY for dim in (8, 64, 768) if (capability, dim) not in COMPILED
]


@pytest.mark.parametrize(
    ("capability", "dim"), [*COMPILED, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_the_kernels_compile_for_a_gpu(capability: int, dim: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    blocking = Blocking.of(1, 65_536, 100_000, dim, processors=132)
    sizes = dict.fromkeys(("num_vectors", "num_codes", "num_tiles", "tiles_per_split"), "i32")
    outputs = {"upper": "*fp32", "counts": "*i32", "candidates": "*i32", "lower": "*fp32"}
    rows = {"halves": "*fp32", "row_bounds": "*fp32", "tile_bounds": "*fp32", "slack": "fp32"}
    shared = {
        "CHUNK": blocking.chunk,
        "TILE": blocking.tile,
        "SIZE": blocking.candidate_size,
        "SPLITS": blocking.splits,
    }
    shared["CAPACITY"] = CAPACITY
    for kernel, types, constants in (
        (
            kernels.screen_kernel,
            {"vectors": "*bf16", "codes": "*bf16", **rows, **outputs, **sizes},
            {**shared, "PADDED": blocking.padded, "ROWS": blocking.rows, "TINY": screening.TINY},
        ),
        (
            kernels.rescore_kernel,
            {"vectors": "*fp32", "codes": "*fp32", "ids": "*i64", **outputs, **sizes},
            {**shared, "DIM": dim},
        ),
    ):
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        pointers = [place for place, name in enumerate(names) if signature[name].startswith("*")]
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(place,): [["tt.divisibility", 16]] for place in pointers},
        )
        warps = 4 if blocking.rows == 64 else 8
        options = {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024
        registers, spilled = resources(compiled.asm["cubin"])
        assert registers * 32 * warps <= 65_536  # the registers of a multiprocessor
        assert spilled <= 1024
        if kernel is kernels.screen_kernel:
            product = {90: "wgmma", 100: "tcgen05.mma"}.get(capability, "mma.sync")
            assert product in compiled.asm["ptx"]


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, of the kernel that ptxas compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{name}:(\d+)", text) for name in ("REG", "STACK"))
    assert registers is not None
    assert stack is not None
    return int(registers[1]), int(stack[1])
