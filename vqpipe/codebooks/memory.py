"""Whether a clustering goes into memory, known before it starts.

N vectors, K centres, D dimensions.
"""

import torch

from vqpipe.codebooks.feature_set import FeatureSet
from vqpipe.codebooks.seeding import num_candidates, sample_rows
from vqpipe.device import available_bytes
from vqpipe.errors import ConfigError

CENTRE_BYTES = 24  # per number: float32 centres, their copy for the search, int64 sums, and a copy being saved
BLOCK_COPIES = 4  # float32 blocks at a time: one being read, one worked on, its differences, what the search makes
VECTOR_BYTES = 36  # per vector: its hash, the order of hashes, which are distinct, its distance


def check_memory(features: FeatureSet, k: int, device: torch.device) -> None:
    """Estimate what clustering `features` into K centres takes at its peak, and compare it with what is free.

    Raises:
        ConfigError: it does not fit; both numbers are named.
    """
    working = working_bytes(features, k)
    if device.type == "cuda":
        compare(working, torch.cuda.mem_get_info(device)[0], k, features.dim, "the GPU")
        working = 8 * k * features.dim + block_bytes(features)
    compare(working + VECTOR_BYTES * features.num_vectors, available_bytes(), k, features.dim, "this machine")


def room_for_features(features: FeatureSet, k: int, device: torch.device, share: float) -> int:
    """Bytes of a GPU that features may take: `share` of what is free, less where the work needs it; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free = torch.cuda.mem_get_info(device)[0]
    return max(0, min(int(share * free), free - working_bytes(features, k)))


def working_bytes(features: FeatureSet, k: int) -> int:
    """What iterations or the choice of first centres take, whichever is more, and the blocks that pass through."""
    sampled = sample_rows(features.num_vectors, features.dim, k)
    seeding = (4 * features.dim + 64) * sampled + 8 * num_candidates(k) * features.dim
    return max(CENTRE_BYTES * k * features.dim, seeding) + block_bytes(features)


def block_bytes(features: FeatureSet) -> int:
    return BLOCK_COPIES * 4 * features.block_stop(0) * features.dim


def compare(needed: int, free: int, k: int, dim: int, where: str) -> None:
    if needed > free:
        raise ConfigError(
            f"k = {k:,} centres of dimension {dim} need about {needed / 1e9:,.2f} GB, {where} has {free / 1e9:,.2f} GB"
            " free",
            "Use a smaller k, or a machine with more memory",
        )
