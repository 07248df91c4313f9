# mypy: ignore-errors
"""The two Triton kernels of `screening`, described there. (mypy cannot check Triton's types.)

Shapes: G groups, N vectors, K codes, D dimensions, P with padding, T tiles of codes, S splits.
"""

import triton
import triton.language as tl


@triton.jit
def screen_kernel(
    vectors,  # bfloat16[G, N, P]
    codes,  # bfloat16[G, K, P]
    halves,  # float32[G, K]: |c|^2 / 2
    row_bounds,  # float32[G, N, 2]: |v - v^|, |v|
    tile_bounds,  # float32[G, T, 2]: the largest |c - c^|, |c| of a tile
    upper,
    counts,
    candidates,
    lower,
    num_vectors,
    num_codes,
    num_tiles,
    tiles_per_split,
    slack,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    TINY: tl.constexpr,
):
    """One program: ROWS vectors of one group against one split of its codes."""
    split = tl.program_id(1)
    group = tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)
    inside = first_row + row < num_vectors
    place = group * num_vectors + first_row
    vectors += place * PADDED
    row_bounds += place * 2
    upper += place * SPLITS
    counts += place * SPLITS
    candidates += place * SPLITS * CAPACITY
    lower += place * SPLITS * CAPACITY
    codes += group * num_codes * PADDED
    halves += group * num_codes
    tile_bounds += group * num_tiles * 2
    lists = row * SPLITS + split
    chunk = tl.arange(0, CHUNK)
    vector_error = tl.load(row_bounds + row * 2, mask=inside, other=0.0)
    vector_norm = tl.load(row_bounds + row * 2 + 1, mask=inside, other=0.0)
    vector_at = vectors + row[:, None] * PADDED + chunk[None, :]
    if PADDED == CHUNK:
        whole = tl.load(vector_at, mask=inside[:, None], other=0.0)
    best = tl.full((ROWS,), float("inf"), tl.float32)
    count = tl.zeros((ROWS,), tl.int32)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, num_tiles)):
        columns = tile * TILE + tl.arange(0, TILE)
        real = columns < num_codes
        column_at = codes + columns[None, :].to(tl.int64) * PADDED + chunk[:, None]
        if PADDED == CHUNK:
            part = tl.load(column_at, mask=real[None, :], other=0.0)
            dots = tl.dot(whole, part)
        else:
            dots = tl.zeros((ROWS, TILE), tl.float32)
            for start in range(0, PADDED, CHUNK):
                some = tl.load(vector_at + start, mask=inside[:, None], other=0.0)
                part = tl.load(column_at + start, mask=real[None, :], other=0.0)
                dots = tl.dot(some, part, dots)
        half = tl.load(halves + columns, mask=real, other=float("inf"))
        scores = half[None, :] - dots
        lowest = tl.min(scores, axis=1)
        code_error, code_norm = tl.load(tile_bounds + tile * 2), tl.load(tile_bounds + tile * 2 + 1)
        both = vector_norm + code_norm
        error = vector_error * code_norm + vector_norm * code_error + slack * both * both + TINY
        best = tl.minimum(best, lowest + error)
        possible = inside & (lowest - error <= best)
        if SIZE == 1:
            if tl.max(possible.to(tl.int32), axis=0) > 0:
                hits = possible[:, None] & real[None, :] & (scores - error[:, None] <= best[:, None])
                ones = hits.to(tl.int32)
                slots = count[:, None] + tl.cumsum(ones, axis=1) - ones
                fits = hits & (slots < CAPACITY)
                at = lists[:, None] * CAPACITY + slots
                tl.store(candidates + at, tl.zeros((ROWS, TILE), tl.int32) + columns[None, :], mask=fits)
                tl.store(lower + at, scores - error[:, None], mask=fits)
                count += tl.sum(ones, axis=1)
        else:
            fits = possible & (count < CAPACITY)
            at = lists * CAPACITY + count
            tl.store(candidates + at, tl.zeros((ROWS,), tl.int32) + tile, mask=fits)
            tl.store(lower + at, lowest - error, mask=fits)
            count += possible.to(tl.int32)
    tl.store(upper + lists, best, mask=inside)
    tl.store(counts + lists, count, mask=inside)


@triton.jit
def rescore_kernel(
    vectors,  # float32[G, N, D]
    codes,  # float32[G, K, D]
    upper,
    counts,
    candidates,
    lower,
    ids,
    num_vectors,
    num_codes,
    num_tiles,
    tiles_per_split,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """One program: one vector against its candidates."""
    group = tl.program_id(1).to(tl.int64)
    place = group * num_vectors + tl.program_id(0)
    vector_at = vectors + place * DIM
    code_at = codes + group * num_codes * DIM
    bound = tl.min(tl.load(upper + place * SPLITS + tl.arange(0, SPLITS)), axis=0)
    best = float("inf")
    best_id = 2147483647
    for split in range(SPLITS):
        count = tl.load(counts + place * SPLITS + split)
        if count > CAPACITY:
            first = split * tiles_per_split
            for tile in range(first, tl.minimum(first + tiles_per_split, num_tiles)):
                columns = tile * TILE + tl.arange(0, TILE)
                best, best_id = closer(vector_at, code_at, columns, num_codes, best, best_id, DIM, CHUNK, TILE)
        else:
            at = (place * SPLITS + split) * CAPACITY
            for number in range(count):
                if tl.load(lower + at + number) <= bound:
                    columns = tl.load(candidates + at + number) * SIZE + tl.arange(0, SIZE)
                    best, best_id = closer(vector_at, code_at, columns, num_codes, best, best_id, DIM, CHUNK, SIZE)
    tl.store(ids + place, tl.where(best_id == 2147483647, 0, best_id).to(tl.int64))  # for a vector that is not finite


@triton.jit
def closer(
    vector_at, code_at, columns, num_codes, best, best_id, DIM: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr
):
    """The best of the best so far and the SIZE codes at `columns`; of equal distances, the lower id."""
    real = columns < num_codes
    column_at = code_at + columns[:, None].to(tl.int64) * DIM
    squares = tl.zeros((SIZE,), tl.float32)
    for start in range(0, DIM, CHUNK):
        chunk = start + tl.arange(0, CHUNK)
        vector = tl.load(vector_at + chunk, mask=chunk < DIM, other=0.0)
        gap = tl.load(column_at + chunk[None, :], mask=real[:, None] & (chunk[None, :] < DIM), other=0.0)
        gap -= vector[None, :]
        squares += tl.sum(gap * gap, axis=1)
    squares = tl.where(real, squares, float("inf"))
    lowest = tl.min(squares, axis=0)
    lowest_id = tl.min(tl.where(squares == lowest, columns, 2147483647), axis=0)
    wins = (lowest < best) | ((lowest == best) & (lowest_id < best_id))
    return tl.where(wins, lowest, best), tl.where(wins, lowest_id, best_id)
