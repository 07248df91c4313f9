"""The training step of a quantizer alone: ours, and vector-quantize-pytorch's where it is installed.

A step is a forward pass with search, a backward pass, and an update of the codebook, by AdamW or by moving averages.
N latent vectors are drawn from a standard normal distribution, as are the features of `lc`. All learn D-dimensional
codes; `lc` projects features of FEATURE_DIM dimensions, as does its counterpart, SimVQ with a wide frozen codebook.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vqpipe.benchmarks.search import need_matrices
from vqpipe.benchmarks.timing import Case, Method, Settings, need, quotient, timed, version_of
from vqpipe.progress import Progress
from vqpipe.quantizers import (
    EmaConfig,
    LcConfig,
    Quantizer,
    QuantizerConfig,
    SimVqConfig,
    VqConfig,
    build_quantizer,
)
from vqpipe.search import engine_name

BATCH, SIDE = 8, 16
"""Images and the side of their latents: N = 2048."""
QUICK_BATCH = 1
SIZES, QUICK_SIZES = (8192, 100_000), (1000,)
"""Codebook sizes, K."""
CODE_DIM, FEATURE_DIM = 8, 768
LEARNING_RATE = 1e-4
PACKAGE = "vector-quantize-pytorch"
MATRICES = {"vq": 6, "ema": 6, "simvq": 1, "lc": 1}
"""N x K matrices that the peer of each kind holds at its peak."""


def cases(settings: Settings) -> list[Callable[[Progress], Case]]:
    """A case per codebook size."""
    return [partial(time_steps, settings, k) for k in (QUICK_SIZES if settings.quick else SIZES)]


def time_steps(settings: Settings, k: int, progress: Progress) -> Case:
    """A step of each quantizer, of both packages, in the same rounds."""
    torch.manual_seed(settings.seed)
    batch = QUICK_BATCH if settings.quick else BATCH
    latent = torch.randn(batch, CODE_DIM, SIDE, SIDE).to(settings.device)
    count = batch * SIDE * SIDE
    title = f"training step of a quantizer: N = {count:,}, K = {k:,}, D = {CODE_DIM}"
    case = Case(title, "vectors", {"vectors": count, "codes": k, "dim": CODE_DIM, "feature_dim": FEATURE_DIM})
    quantizers = {config.kind: started(config, settings.device) for config in configs(k)}
    methods = [ours(kind, quantizer, latent) for kind, quantizer in quantizers.items()]
    peers = {f"{PACKAGE}, {kind}": partial(peer, kind, quantizers, latent, settings) for kind in quantizers}
    case.rows = timed(methods, peers, case, settings, progress, count)
    rows = {row.name: row for row in case.rows}
    lc, vq = rows[name_of("lc")], rows[name_of("vq")]
    case.facts = {
        "lc_over_vq": quotient(lc.wall_ms, vq.wall_ms),
        "lc_over_vq_cpu": quotient(lc.cpu_ms, vq.cpu_ms),
    }
    return case


def configs(k: int) -> list[QuantizerConfig]:
    """The quantizers that are measured, with K codes."""
    return [
        VqConfig(codebook_size=k, code_dim=CODE_DIM),
        EmaConfig(codebook_size=k, code_dim=CODE_DIM),
        SimVqConfig(codebook_size=k, code_dim=CODE_DIM),
        LcConfig(codebook_size=k, code_dim=CODE_DIM, feature_dim=FEATURE_DIM),
    ]


def started(config: QuantizerConfig, device: torch.device) -> Quantizer:
    """A quantizer in training mode, whose codes have the variance of the latents, so that many are in use."""
    quantizer = build_quantizer(config)
    if isinstance(config, LcConfig):
        quantizer.load_codebook(torch.randn(config.codebook_size, config.feature_dim))
    quantizer.standardize_codebook()
    return quantizer.to(device).train()


def name_of(kind: str) -> str:
    """The name of our method."""
    return f"vqpipe, {kind}"


def ours(kind: str, quantizer: Quantizer, latent: Tensor) -> Method:
    """Our step; its own time is the unit of its ratios."""
    descend = optimizer_step(quantizer)

    def call() -> None:
        given = latent.clone().requires_grad_()
        output = quantizer(given)
        descend(output.codes.sum() + sum(output.losses.values()))
        quantizer.update(latent, output.ids)

    version = f"{version_of('vqpipe')}, {engine_name(latent.device)}"
    return Method(name=name_of(kind), call=call, version=version, ours=True, baseline=name_of(kind))


def peer(kind: str, quantizers: dict[str, Quantizer], latent: Tensor, settings: Settings) -> Method:
    """The step of vector-quantize-pytorch, from its own initial codes; Unavailable without the package or memory.

    Its straight-through estimator is set to ours, which costs less than its default, the rotation trick.
    """
    package: Any = need("vector_quantize_pytorch")
    k = quantizers[kind].codebook_size
    need_matrices(MATRICES[kind], latent.numel() // CODE_DIM, k, settings)
    if kind in ("vq", "ema"):
        learned = {"learnable_codebook": True, "ema_update": False} if kind == "vq" else {}
        module = package.VectorQuantize(CODE_DIM, k, accept_image_fmap=True, rotation_trick=False, **learned)
        what = "VectorQuantize" + "".join(f", {name} = {value}" for name, value in learned.items())
    else:
        width = FEATURE_DIM if kind == "lc" else CODE_DIM
        module = package.SimVQ(CODE_DIM, k, channel_first=True, rotation_trick=False, frozen_codebook_dim=width)
        module.frozen_codebook = quantizers[kind].codes  # one copy in memory
        what = f"SimVQ, frozen_codebook_dim = {width}"
    module.to(latent.device).train()
    descend = optimizer_step(module)

    def call() -> None:
        codes, _, loss = module(latent.clone().requires_grad_())
        descend(codes.sum() + loss.sum())

    return Method(call=call, version=version_of(PACKAGE), baseline=name_of(kind), note=what)


def optimizer_step(module: nn.Module) -> Callable[[Tensor], None]:
    """A function of the loss: the backward pass, and a step of AdamW over the parameters, if there are any."""
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, fused=True) if parameters else None

    def descend(loss: Tensor) -> None:
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return descend
