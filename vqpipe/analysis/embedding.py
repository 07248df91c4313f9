"""`embedding`: where the codes in use lie among those that are not, in two dimensions by t-SNE (VQGAN-LC, Fig. 4).

If dead codes lie apart, the latents never come where they are. Of a projected codebook (`lc`, `simvq`) two maps are
drawn: the stored features, which are frozen, and the codes that latents are compared with.

Letters: N ids an image, G groups, K codes a group, F channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.analysis.base import Analysis, Subject, left_out
from vqpipe.analysis.codes import codebooks, feature_codebooks
from vqpipe.metrics.usage import CodeUsage
from vqpipe.reports import page, plots

MOST_CODES = 2000
"""Codes drawn over all groups of one map kind, at the most: t-SNE takes seconds for a thousand."""
FEWEST_CODES = 8
"""A codebook of fewer codes needs no map."""
PERPLEXITY = 30.0
"""Neighbours a code looks at, as van der Maaten & Hinton 2008 have it; less where codes are few."""
MOST_CHANNELS = 50
"""Vectors of more channels are first brought to so many by PCA, as the authors of t-SNE advise."""
SPACES = {"features": "stored codes, before the projector", "codes": "codes, as latents are compared with them"}


class Embedding(Analysis):
    """Active means chosen at least once over the set. Where K is too large, codes are drawn evenly, whether active or
    not, so the shares in the picture are those of the codebook. The main rank computes, the others wait for it."""

    name: ClassVar[str] = "embedding"
    state_names: ClassVar[tuple[str, ...]] = ("usage",)

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        quantizer = subject.tokenizer.autoencoder.quantizer
        tables = {"features": feature_codebooks(quantizer), "codes": codebooks(quantizer)}
        self.tables = {space: groups for space, groups in tables.items() if groups}
        self.usage = CodeUsage(quantizer.codebook_size, quantizer.num_groups, subject.tokenizer.device)
        self.maps: list[tuple[str, int, np.ndarray, np.ndarray]] = []
        """(space, group, places float32[n, 2], active bool[n]), on the main rank after `result`."""

    def update(self, originals: Tensor, reconstructions: Tensor, ids: Tensor, keys: Sequence[str]) -> None:
        self.usage.update(ids)

    def result(self) -> dict[str, Any]:
        active = self.usage.merged().counts.cpu() > 0  # bool[G, K]
        reasons: dict[str, str] = {}
        if distributed.is_main():
            for space, tables in self.tables.items():
                for group, table in enumerate(tables):
                    chosen = drawn(table.shape[0], MOST_CODES // len(tables), self.subject.seed)
                    places = embedded(table[chosen.to(table.device)].cpu(), self.subject.seed)
                    if isinstance(places, str):
                        reasons[f"{space}, group {group + 1}"] = places
                    else:
                        self.maps.append((space, group, places, active[group][chosen].numpy()))
        own = [
            {"space": space, "group": group, "codes": len(kept), "active": int(kept.sum())}
            for space, group, _, kept in self.maps
        ]
        maps, reasons = distributed.broadcast_object((own, reasons))
        if not maps:
            return {"not_computed": next(iter(reasons.values()))}
        return {"maps": maps, "active_per_group": active.sum(1).tolist(), "seed": self.subject.seed, "absent": reasons}

    def sections(self, result: Mapping[str, Any]) -> list[page.Section]:
        if "not_computed" in result:
            return left_out(self.name, result)
        several, size = len(result["active_per_group"]) > 1, self.usage.codebook_size
        drawings = []
        for space, group, places, active in self.maps:
            title = SPACES[space][0].upper() + SPACES[space][1:] if len(self.tables) > 1 else "Codes"
            share = f"{result['active_per_group'][group]:,} of {size:,} codes are in use"
            some = f"; {len(active):,} of them drawn (seed {result['seed']})" if len(active) < size else ""
            caption = f"t-SNE. {share}{some}. Distances between far groups of points mean little."
            kinds = {"in use": places[active], "not in use": places[~active]}
            drawings.append(plots.scatter(f"{title}, group {group + 1}" if several else title, kinds, caption))
        return [page.Plots("Codes in use among the others", drawings)]


def drawn(codebook_size: int, most: int, seed: int) -> Tensor:
    """At most `most` ids of a codebook, evenly at random, rising: int64[n]."""
    if codebook_size <= most:
        return torch.arange(codebook_size)
    return torch.randperm(codebook_size, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def embedded(vectors: Tensor, seed: int) -> np.ndarray | str:
    """float32[n, F] -> places float32[n, 2] by t-SNE from a PCA start; or why there is none.

    The same for a seed in one process; t-SNE magnifies every rounding, so another machine may turn or bend the map.
    """
    points = vectors.numpy().astype(np.float64)
    if len(points) < FEWEST_CODES:
        return f"{len(points)} codes are too few for a map"
    points -= points.mean(0)
    spread = np.sqrt(np.square(points).mean())
    if not np.isfinite(spread) or spread == 0:
        return "the codes are all the same, or not finite"
    from sklearn.decomposition import PCA  # seconds
    from sklearn.manifold import TSNE

    points /= spread
    if points.shape[1] > MOST_CHANNELS:
        points = PCA(min(MOST_CHANNELS, len(points)), svd_solver="full").fit_transform(points)
    start = points[:, :1].repeat(2, 1) * [1, 0] if points.shape[1] == 1 else None
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca" if start is None else start, random_state=seed)
    return tsne.fit_transform(points.astype(np.float32)).astype(np.float32)
