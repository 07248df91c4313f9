"""Conversion of released weights: the family is detected from tensor names, all sizes from tensor shapes.

    family         model and quantizer                     prefixes of its tensor names
    vqgan-lc       vqgan + lc, vq or ema                   encoder.mid., tok_embeddings., discriminator.
    mgvq           dcae + multi_group of cvq               encoder.stages.
    llamagen       vqgan + vq with normalize               encoder.conv_blocks.
    fvq            vqgan + vq                              the same as llamagen, with codes of 64 channels or more
    taming         vqgan + vq                              encoder.mid.block_1., quantize., loss.
    ibq            vqgan + ibq                             the same as taming, with averages and four blocks per level
    var            vqgan + multi_scale                     encoder.mid., quantize.quant_resi.
    open-magvit2   magvit + lfq                            encoder.mid_block., decoder.adaptive.
    wetok          magvit + multi_group of lfq             the same, with 32 or more bits
    bitdance       magvit + multi_group of lfq             the same as wetok, without loss. and averages
    simvq          magvit + simvq                          encoder.mid_block., quantize.embedding.
    gsq            magvit + multi_group of vq              encoder.fianl_layers., quantizers.codebook.
    unitok         vitamin + multi_group of vq             quantizer.codebooks., post_quant_proj.

A file is a training state or a plain state dict. Pickles are read with `weights_only=True`. Every tensor of the file
must have a place in the model, and every shape must match; anything else is an error. `refused` recognizes tokenizers
that cannot be imported.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vqpipe.config import nearest_name
from vqpipe.errors import ConfigError, WeightsError
from vqpipe.models.released.checkpoint import Checkpoint, join_names
from vqpipe.models.released.family import Family, Released, load
from vqpipe.models.released.gsq import Gsq
from vqpipe.models.released.llamagen import Fvq, LlamaGen
from vqpipe.models.released.mgvq import Mgvq
from vqpipe.models.released.open_magvit2 import Bitdance, OpenMagvit2, Wetok
from vqpipe.models.released.refused import refuse_names
from vqpipe.models.released.simvq import SimVq
from vqpipe.models.released.taming import Ibq, Taming
from vqpipe.models.released.unitok import UniTok
from vqpipe.models.released.var import Var
from vqpipe.models.released.vqgan_lc import VqganLc

__all__ = ["FAMILIES", "Released", "check_family", "read_released"]

FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (VqganLc, Mgvq, LlamaGen, Var, Taming, Ibq, OpenMagvit2, Wetok, Bitdance, SimVq, Fvq, Gsq, UniTok)
}
"""The families by name."""


def check_family(family: str | None) -> None:
    """Raise a ConfigError unless this is a key of `FAMILIES`, or None."""
    if family is not None and family not in FAMILIES:
        raise ConfigError(f"family {family!r} is unknown", nearest_name(family, FAMILIES))


def read_released(path: Path, family: str | None = None, codebook: Tensor | None = None) -> Released:
    """Read a released tokenizer.

    Args:
        path: PyTorch or safetensors file.
        family: a key of `FAMILIES`; None: detect it.
        codebook: float[K, F], for files released without their codebook.

    Raises:
        WeightsError: the file is damaged, contains more than tensors, or does not match a known family exactly.
        NumericError: a weight contains NaN or infinity.
        ConfigError: an unknown family, or a codebook for a file that contains one.
    """
    check_family(family)
    checkpoint = Checkpoint(path)
    _, weights = checkpoint.weights(())
    cls = FAMILIES[family] if family else detect_family(path, weights.tensors)
    container, weights = checkpoint.weights(cls.containers)
    source = cls(weights, codebook)
    if container in cls.containers:
        source.notes.append(f"used the weights under {container!r}, which its authors evaluate")
    if unused := checkpoint.unused(container):
        source.notes.append(f"ignored in the training state: {join_names(unused)}")
    return load(source)


def detect_family(path: Path, tensors: Mapping[str, Tensor]) -> type[Family]:
    """The family of these tensors.

    Raises:
        WeightsError: there is none.
    """
    refuse_names(path, tensors)
    for family in FAMILIES.values():
        if family.matches(tensors):
            return family
    raise WeightsError(
        f"{path} contains {join_names(list(tensors))}, which matches no known family",
        f"Known are {', '.join(FAMILIES)}",
    )
