"""Analyses of the papers beyond single numbers, updated in the evaluation pass: replacement, embedding, patches."""

from collections.abc import Mapping, Sequence

from torch import nn

from vqpipe.analysis.base import MissingPackage, NotComputed
from vqpipe.analysis.embedding import Embedding
from vqpipe.analysis.patches import Patches
from vqpipe.analysis.replacement import Replacement
from vqpipe.continuous import ContinuousAutoencoder, ImageAutoencoder
from vqpipe.errors import ConfigError
from vqpipe.evaluation.analysis import EMBEDDING_CODES, Analysis, AnalysisInputs

ANALYSES: dict[str, type[Analysis]] = {each.name: each for each in (Replacement, Embedding, Patches)}
"""By name, in the order of the page."""

__all__ = ["ANALYSES", "EMBEDDING_CODES", "Analysis", "build"]


def build(
    names: Sequence[str],
    tokenizer: ImageAutoencoder,
    *,
    perceptual: Mapping[str, nn.Module] | None = None,
    seed: int = 0,
    embedding_codes: int = EMBEDDING_CODES,
) -> list[Analysis]:
    """The analyses of these names, each once, in the order of ANALYSES.

    One that does not apply to this tokenizer (of a quantizer without a codebook, say) has the reason as its result.

    Args:
        perceptual: LPIPS networks by key, on the device of the tokenizer, for analyses that measure distortion.
        seed: of the codes drawn from a codebook that is too large.
        embedding_codes: codes that `embedding` shows at most, over all groups.

    Raises:
        ConfigError: an unknown name, or a package is not installed.
    """
    for name in names:
        if name not in ANALYSES:
            raise ConfigError(f"there is no analysis {name!r}", f"Choose from {', '.join(ANALYSES)}")
    chosen = [name for name in ANALYSES if name in names]
    if isinstance(tokenizer, ContinuousAutoencoder):
        return [NotComputed(name, "continuous latents: there are no codes") for name in chosen]
    inputs = AnalysisInputs(tokenizer, perceptual or {}, seed, embedding_codes)
    return [build_one(name, inputs) for name in chosen]


def build_one(name: str, inputs: AnalysisInputs) -> Analysis:
    """The analysis of that name, or the reason why it does not apply."""
    try:
        return ANALYSES[name](inputs)
    except MissingPackage:
        raise
    except ConfigError as error:
        return NotComputed(name, error.what)
