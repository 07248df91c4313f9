"""Released weights -> our networks: the family of a file is found from its names, every size from its shapes.

    family         what it is here                         its names begin with
    vqgan-lc       vqgan + lc, vq or ema                   encoder.mid., tok_embeddings., discriminator.
    mgvq           dcae + multi_group of cvq               encoder.stages.
    llamagen       vqgan + vq on the unit sphere           encoder.conv_blocks.
    taming         vqgan + vq                              encoder.mid., quantize., loss.
    ibq            vqgan + ibq                             the same: it has to be asked for
    var            vqgan + multi_scale                     encoder.mid., quantize.quant_resi.
    open-magvit2   magvit + lfq                            encoder.mid_block., decoder.adaptive.

A file is one of its authors' training states, or its weights alone; a pickle is read without running it. Every name in
it is accounted for, and every shape checked: what does not fit is an error, never passed over.
"""

from pathlib import Path

from torch import Tensor

from vqpipe.config import nearest_name
from vqpipe.errors import ConfigError, WeightsError
from vqpipe.models.released.checkpoint import Checkpoint, listed
from vqpipe.models.released.family import Family, Released, load
from vqpipe.models.released.ibq import Ibq
from vqpipe.models.released.llamagen import LlamaGen
from vqpipe.models.released.mgvq import Mgvq
from vqpipe.models.released.open_magvit2 import OpenMagvit2
from vqpipe.models.released.taming import Taming
from vqpipe.models.released.var import Var
from vqpipe.models.released.vqgan_lc import VqganLc

__all__ = ["FAMILIES", "Released", "read_released"]

FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (VqganLc, Mgvq, LlamaGen, Var, Taming, Ibq, OpenMagvit2)
}
"""The families by name, in the order in which a file is asked whether it is theirs."""


def read_released(path: Path, family: str | None = None, codebook: Tensor | None = None) -> Released:
    """Read a released tokenizer; `family` insists on one, `codebook` (float[K, F]) is for files released without.

    Raises:
        WeightsError: the file is damaged, holds more than tensors, or is not, whole, of a known family.
        NumericError: a weight holds NaN or infinity.
        ConfigError: no such family, or a codebook for a file that has its own.
    """
    if family is not None and family not in FAMILIES:
        raise ConfigError(f"family {family!r} is unknown", nearest_name(family, FAMILIES))
    checkpoint = Checkpoint(path)
    _, weights = checkpoint.weights(())
    chosen = FAMILIES[family] if family else recognised(path, list(weights.tensors))
    container, weights = checkpoint.weights(chosen.containers)
    made = chosen(weights, codebook)
    if container in chosen.containers:
        made.notes.append(f"its weights are those under {container!r}, the ones its authors evaluate")
    if left_out := checkpoint.left_out(container):
        made.notes.append(f"left out of its training state: {listed(left_out)}")
    return load(made)


def recognised(path: Path, names: list[str]) -> type[Family]:
    """The family whose names these are; none is a WeightsError."""
    for family in FAMILIES.values():
        if family.recognises(names):
            return family
    raise WeightsError(
        f"{path} holds {listed(names)}: the names of no known family", f"Known are {', '.join(FAMILIES)}"
    )
