"""`embedding`: active and inactive codes in two dimensions, by t-SNE (VQGAN-LC, Fig. 4).

Inactive codes far from the active ones lie where there are no latents. For a projected codebook (`lc`, `simvq`) there
are two maps: of the stored features, which are frozen, and of the codes that latents are compared with.

Shapes: N ids per image, G groups, K codes per group, F channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from vqpipe import distributed
from vqpipe.analysis.base import Analysis, AnalysisInputs, codebooks, reason_section, sample_ids
from vqpipe.metrics.usage import CodeUsage
from vqpipe.quantizers import FrozenCodebookQuantizer, MultiGroupQuantizer, Quantizer
from vqpipe.reports import page, plots

MAX_CODES = 2000
"""Codes drawn over all groups of one kind of map: t-SNE takes seconds for a thousand."""
MIN_CODES = 8
PERPLEXITY = 30.0
"""Neighbors of a code (van der Maaten & Hinton 2008); fewer for few codes."""
MAX_CHANNELS = 50
"""Vectors of more channels are first reduced by PCA, as the authors of t-SNE recommend."""
SPACES = {"features": "Stored codes, before the projector", "codes": "Codes that latents are compared with"}


class Embedding(Analysis):
    """A code is active if it is chosen at least once over the set. For a large K the codes are drawn uniformly, active
    or not, so that the shares on the map are those of the codebook. The main rank computes the maps."""

    name: ClassVar[str] = "embedding"
    state_names: ClassVar[tuple[str, ...]] = ("usage",)

    def __init__(self, inputs: AnalysisInputs) -> None:
        super().__init__(inputs)
        quantizer = inputs.tokenizer.autoencoder.quantizer
        spaces = {"features": stored_features(quantizer), "codes": codebooks(quantizer)}
        self.spaces = {space: groups for space, groups in spaces.items() if groups}
        self.usage = CodeUsage(quantizer.codebook_size, quantizer.num_groups, inputs.tokenizer.device)
        self.maps: list[tuple[str, int, np.ndarray, np.ndarray]] = []
        """(space, group, points float32[n, 2], active bool[n]), on the main rank after `result`."""

    def update(self, originals: Tensor, reconstructions: Tensor, ids: Tensor, keys: Sequence[str]) -> None:
        self.usage.update(ids)

    def result(self) -> dict[str, Any]:
        active = self.usage.merged().counts.cpu() > 0  # bool[G, K]
        seed = self.inputs.seed
        reasons: dict[str, str] = {}
        if distributed.is_main():
            for space, groups in self.spaces.items():
                for group, codes in enumerate(groups):
                    chosen = sample_ids(len(codes), MAX_CODES // len(groups), seed)
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

    def sections(self, result: Mapping[str, Any]) -> list[page.Section]:
        if "not_computed" in result:
            return reason_section(self.name, result)
        several, size = len(result["active_per_group"]) > 1, self.usage.codebook_size
        drawn = []
        for space, group, points, active in self.maps:
            title = SPACES[space] if len(self.spaces) > 1 else "Codes"
            share = f"{result['active_per_group'][group]:,} of {size:,} codes are active"
            some = f"; {len(active):,} codes are drawn (seed {result['seed']})" if len(active) < size else ""
            caption = f"t-SNE. {share}{some}. Distances between far clusters have little meaning."
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
    if points.shape[1] > MAX_CHANNELS:
        points = PCA(min(MAX_CHANNELS, len(points)), svd_solver="full").fit_transform(points)
    start = points[:, :1].repeat(2, 1) * [1, 0] if points.shape[1] == 1 else None
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca" if start is None else start, random_state=seed)
    return model.fit_transform(points.astype(np.float32)).astype(np.float32)
