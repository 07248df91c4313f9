"""Conversion of released weights: the family is detected from tensor names, all sizes from tensor shapes.

    family         model and quantizer                     prefixes of its tensor names
    vqgan-lc       vqgan + lc, vq or ema                   encoder.mid., tok_embeddings., discriminator.
    mgvq           dcae + multi_group of cvq               encoder.stages.
    llamagen       vqgan + vq with normalize               encoder.conv_blocks.
    taming         vqgan + vq                              encoder.mid., quantize., loss.
    ibq            vqgan + ibq                             the same as taming: never detected
    var            vqgan + multi_scale                     encoder.mid., quantize.quant_resi.
    open-magvit2   magvit + lfq                            encoder.mid_block., decoder.adaptive.

A file is a training state or a plain state dict. Pickles are read with `weights_only=True`. Every tensor of the file
must have a place in the model, and every shape must match; anything else is an error.
"""

from pathlib import Path

from torch import Tensor

from vqpipe.config import nearest_name
from vqpipe.errors import ConfigError, WeightsError
from vqpipe.models.released.checkpoint import Checkpoint, join_names
from vqpipe.models.released.family import Family, Released, load
from vqpipe.models.released.llamagen import LlamaGen
from vqpipe.models.released.mgvq import Mgvq
from vqpipe.models.released.open_magvit2 import OpenMagvit2
from vqpipe.models.released.taming import Ibq, Taming
from vqpipe.models.released.var import Var
from vqpipe.models.released.vqgan_lc import VqganLc

__all__ = ["FAMILIES", "Released", "read_released"]

FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (VqganLc, Mgvq, LlamaGen, Var, Taming, Ibq, OpenMagvit2)
}
"""The families by name, in the order of detection."""


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
    if family is not None and family not in FAMILIES:
        raise ConfigError(f"family {family!r} is unknown", nearest_name(family, FAMILIES))
    checkpoint = Checkpoint(path)
    _, weights = checkpoint.weights(())
    cls = FAMILIES[family] if family else detect_family(path, list(weights.tensors))
    container, weights = checkpoint.weights(cls.containers)
    source = cls(weights, codebook)
    if container in cls.containers:
        source.notes.append(f"used the weights under {container!r}, which its authors evaluate")
    if unused := checkpoint.unused(container):
        source.notes.append(f"ignored in the training state: {join_names(unused)}")
    return load(source)


def detect_family(path: Path, names: list[str]) -> type[Family]:
    """The family with these tensor names.

    Raises:
        WeightsError: there is none.
    """
    for family in FAMILIES.values():
        if family.matches(names):
            return family
    raise WeightsError(
        f"{path} contains {join_names(names)}, which matches no known family", f"Known are {', '.join(FAMILIES)}"
    )
