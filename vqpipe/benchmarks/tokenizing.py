"""Images to ids by a small network, for codebooks of several sizes, with our search and with the published one."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vqpipe.benchmarks import networks
from vqpipe.benchmarks.measure import Case, Method, Plan, Settings, Stopwatch, need_memory, offered, version_of
from vqpipe.benchmarks.search import CHECKED, MATRICES, reference_ids, share_of_equal
from vqpipe.data.transforms import to_float
from vqpipe.models import AutoencoderConfig
from vqpipe.quantizers.base import to_rows
from vqpipe.search import engine_name
from vqpipe.tokenizer import Tokenizer

SIZES = (1000, 16_384, 100_000)
QUICK_SIZES = (100, 2000)
OURS, NAIVE = "vqpipe", "naive search"


def plans(settings: Settings, config: AutoencoderConfig) -> list[Plan]:
    """A case per codebook size, on the network of `config`."""
    batch = 2 if settings.quick else 64 if settings.device.type == "cuda" else 8
    size = 64 if settings.quick else 256 if settings.device.type == "cuda" else 128
    sizes = QUICK_SIZES if settings.quick else SIZES
    return [Plan(title(k, batch, size), 2, partial(compare, settings, config, k, batch, size)) for k in sizes]


def title(k: int, batch: int, size: int) -> str:
    return f"images to ids: K = {k:,}, {batch} images of {size} px"


def compare(settings: Settings, config: AutoencoderConfig, k: int, batch: int, size: int, stopwatch: Stopwatch) -> Case:
    """Tokenizer.encode with either search."""
    case = Case(
        title=title(k, batch, size),
        unit="images",
        settings={"codebook_size": k, "batch": batch, "image_size": size},
    )
    model = networks.build(networks.with_codes(config, k), size, settings.device, settings.seed)
    tokenizer = Tokenizer(model, image_size=size, device=settings.device)
    images = networks.photographs(batch, size).to(settings.device)
    tokens = tokenizer.layout(size, size).num_tokens
    case.settings["vectors"] = batch * tokens

    def naive() -> Tensor:
        with networks.searching_with(networks.naive):
            return tokenizer.encode(images).flatten()

    def published() -> Method:
        gigabytes = MATRICES * 4e-9 * batch * tokens * k
        need_memory(gigabytes, settings, f"{MATRICES} matrices of N x K = {batch * tokens:,} x {k:,}")
        return Method(name=NAIVE, call=naive, version=version_of("torch"))

    def own() -> Method:
        version = f"{version_of('vqpipe')}, {engine_name(settings.device)}"
        return Method(name=OURS, call=lambda: tokenizer.encode(images).flatten(), version=version, ours=True)

    makers: dict[str, Callable[[], Method]] = {OURS: own, NAIVE: published}
    methods = offered(makers, case)
    samples = stopwatch.measure(methods, case)
    with torch.no_grad():
        vectors = to_rows(model.latent(to_float(images)))[:CHECKED]
        truth = reference_ids(vectors, model.quantizer.codebook())
    case.facts = {"checked_vectors": len(vectors)}
    case.rows = stopwatch.rows(methods, samples, batch, partial(share_of_equal, truth))
    return case
