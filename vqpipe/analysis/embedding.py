"""`embedding`: active and inactive codes in two dimensions, by t-SNE (VQGAN-LC, Fig. 4).

Inactive codes far from the active ones lie where there are no latents. For a projected codebook (`lc`, `simvq`) there
are two maps: of the stored features, which are frozen, and of the codes that latents are compared with.

t-SNE is scikit-learn's for up to MAX_SKLEARN points of a map, and openTSNE's beyond: 2 to 6 minutes for 20,000 codes of
8 channels, and 13 for 100,000, on one core of a busy machine.

Shapes: N ids per image, G groups, K codes per group, F channels.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from vqpipe import distributed
from vqpipe.analysis.base import MissingPackage, codebooks, sample_ids
from vqpipe.evaluation.analysis import Analysis, AnalysisInputs
from vqpipe.metrics.usage import CodeUsage
from vqpipe.quantizers import FrozenCodebookQuantizer, MultiGroupQuantizer, Quantizer
from vqpipe.reports import page, plots

MIN_CODES = 8
MAX_SKLEARN = 5000
"""Points of a map above which openTSNE is used: the time of scikit-learn's t-SNE grows faster."""
PERPLEXITY = 30.0
"""Neighbors of a code (van der Maaten & Hinton 2008); fewer for few codes."""
MAX_CHANNELS = 50
"""Vectors of more channels are first reduced by PCA, as the authors of t-SNE recommend."""
SPACES = {"features": "Stored codes, before the projector", "codes": "Codes that latents are compared with"}


class Embedding(Analysis):
    """A code is active if it is chosen at least once over the set. At most `inputs.embedding_codes` codes, over all
    groups of one kind of map, are sampled uniformly, active or not, so that the shares on the map are those of the
    codebook. The main rank computes the maps."""

    name: ClassVar[str] = "embedding"
    state_names: ClassVar[tuple[str, ...]] = ("usage",)

    def __init__(self, inputs: AnalysisInputs) -> None:
        super().__init__(inputs)
        quantizer = inputs.tokenizer.autoencoder.quantizer
        spaces = {"features": stored_features(quantizer), "codes": codebooks(quantizer)}
        self.spaces = {space: groups for space, groups in spaces.items() if groups}
        largest = max(self.num_codes(groups) for groups in self.spaces.values())
        if largest > MAX_SKLEARN and find_spec("openTSNE") is None:
            raise MissingPackage(
                f"t-SNE of {largest:,} codes needs the package openTSNE, which is not installed",
                "Install the extra: pip install 'vqpipe[embedding]', or lower --embedding-codes",
            )
        self.usage = CodeUsage(quantizer.codebook_size, quantizer.num_groups, inputs.tokenizer.device)
        self.maps: list[tuple[str, int, np.ndarray, np.ndarray]] = []
        """(space, group, points float32[n, 2], active bool[n]), on the main rank after `result`."""

    def num_codes(self, groups: Sequence[Tensor]) -> int:
        """How many codes of each group, float[K, F], are on its map."""
        return min(len(groups[0]), self.inputs.embedding_codes // len(groups))

    def update(self, originals: Tensor, reconstructions: Tensor, ids: Tensor, keys: Sequence[str]) -> None:
        self.usage.update(ids)

    def result(self) -> dict[str, Any]:
        active = self.usage.merged().counts.cpu() > 0  # bool[G, K]
        seed = self.inputs.seed
        reasons: dict[str, str] = {}
        if distributed.is_main():
            for space, groups in self.spaces.items():
                for group, codes in enumerate(groups):
                    chosen = sample_ids(len(codes), self.num_codes(groups), seed)
                    points = tsne(codes[chosen.to(codes.device)].cpu(), seed)
                    if isinstance(points, str):
                        reasons[f"{space}, group {group + 1}"] = points
                    else:
                        self.maps.append((space, group, points, active[group][chosen].numpy()))
        own = [
            {"space": space, "group": group, "codes": len(kept), "active": int(kept.sum())}
            for space, group, _, kept in self.maps
        ]
        maps, reasons = distributed.broadcast_object((own, reasons))
        if not maps:
            return {"not_computed": next(iter(reasons.values()))}
        return {"maps": maps, "active_per_group": active.sum(1).tolist(), "seed": seed, "absent": reasons}

    def sections_of(self, result: Mapping[str, Any]) -> list[page.Section]:
        several, size = len(result["active_per_group"]) > 1, self.usage.codebook_size
        drawn = []
        for space, group, points, active in self.maps:
            title = SPACES[space] if len(self.spaces) > 1 else "Codes"
            share = f"{result['active_per_group'][group]:,} of {size:,} codes are active"
            some = f", sampled uniformly (seed {result['seed']})" if len(active) < size else ""
            caption = (
                f"t-SNE. {share}. {len(active):,} of {size:,} are shown{some}. "
                "Distances between far clusters have little meaning."
            )
            classes = {"active": points[active], "inactive": points[~active]}
            drawn.append(plots.scatter(f"{title}, group {group + 1}" if several else title, classes, caption))
        return [page.Plots("Active and inactive codes", drawn)]


def stored_features(quantizer: Quantizer) -> list[Tensor]:
    """The codes of each group before the projector, float32[K, F]; empty without a projector."""
    if isinstance(quantizer, MultiGroupQuantizer):
        return [features for group in quantizer.quantizers() for features in stored_features(group)]
    if isinstance(quantizer, FrozenCodebookQuantizer) and len(quantizer.projector):
        return [quantizer.codes.detach().float()]
    return []


def tsne(vectors: Tensor, seed: int) -> np.ndarray | str:
    """float32[n, F] -> points float32[n, 2] by t-SNE, initialized by PCA; or the reason why there are none.

    Reproducible in one environment; t-SNE amplifies every rounding, so that maps of two machines may differ.
    """
    points = vectors.numpy().astype(np.float64)
    if len(points) < MIN_CODES:
        return f"{len(points)} codes are too few for a map"
    points -= points.mean(0)
    spread = np.sqrt(np.square(points).mean())
    if not np.isfinite(spread) or spread == 0:
        return "the codes are all the same, or not finite"
    from sklearn.decomposition import PCA  # takes seconds
    from sklearn.manifold import TSNE

    points /= spread
    large = len(points) > MAX_SKLEARN
    if points.shape[1] > MAX_CHANNELS:
        solver = "covariance_eigh" if large else "full"
        points = PCA(min(MAX_CHANNELS, len(points)), svd_solver=solver).fit_transform(points)
    start: Any = points[:, :1].repeat(2, 1) * [1, 0] if points.shape[1] == 1 else "pca"
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    if large:
        import openTSNE

        model = openTSNE.TSNE(perplexity=perplexity, initialization=start, neighbors="exact", random_state=seed)
        return np.asarray(model.fit(points), dtype=np.float32)
    return TSNE(perplexity=perplexity, init=start, random_state=seed).fit_transform(points.astype(np.float32))
