"""What training and sampling of autoregressive generators cost beside the plain ways of doing the same.

Two cases: the cross-entropy of a large vocabulary, forwards and backwards, in chunks and with all logits at once; and
ids drawn from a small GPT with kept keys and values, and with the whole sequence run for every id, as VQGAN-LC's
released sampler does.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.benchmarks.measure import Case, Method, Plan, Samples, Settings, Stopwatch, need_memory, offered, version_of
from vqpipe.generation.base import SamplingConfig, Space
from vqpipe.generation.cross_entropy import CHUNK_LOGITS, chunked_cross_entropy
from vqpipe.generation.gpt import SIZES, Gpt, GptConfig
from vqpipe.generation.sampling import sample_ids, uniform_noise
from vqpipe.quantizers import TokenLayout

ENTRIES, QUICK_ENTRIES = 101_000, 2000
"""VQGAN-LC's vocabulary: 100,000 codes and 1000 classes."""
WIDTH, GPU_WIDTH = 64, 1024
MEMORY_WANTED = 1 / 8
"""Of the peak of the plain loss: at most so much is wanted."""
SPEED_WANTED = 10.0
"""What running the whole sequence may take at least, in units of keeping keys and values."""
HELD = 3
"""Times that the plain loss holds the logits: they, their log-softmax and their gradient."""
OURS, PLAIN, WHOLE = "vqpipe", "all logits at once", "whole sequence for every id"
SAMPLING = SamplingConfig(top_k=0.1)


def plans(settings: Settings) -> list[Plan]:
    """The loss, and sampling."""
    on_gpu = settings.device.type == "cuda"
    positions = 64 if settings.quick else 8192 if on_gpu else 2048
    entries, width = QUICK_ENTRIES if settings.quick else ENTRIES, GPU_WIDTH if on_gpu else WIDTH
    tokens, images = (16, 2) if settings.quick else (256, 16)
    return [
        Plan(loss_title(entries, positions), 2, partial(compare_losses, settings, entries, positions, width)),
        Plan(sampling_title(tokens, images), 2, partial(compare_sampling, settings, tokens, images)),
    ]


def loss_title(entries: int, positions: int) -> str:
    return f"cross-entropy and its gradients: {entries:,} entries, {positions:,} positions"


def sampling_title(tokens: int, images: int) -> str:
    return f"ids from a tiny GPT: {tokens} ids an image, {images} images"


def compare_losses(settings: Settings, entries: int, positions: int, width: int, stopwatch: Stopwatch) -> Case:
    """Time and memory of loss and gradients, in float32, and how far apart the two ways are."""
    case = Case(
        title=loss_title(entries, positions),
        unit="positions",
        settings={"entries": entries, "positions": positions, "dim": width, "chunk_logits": CHUNK_LOGITS},
    )
    draw = torch.Generator().manual_seed(settings.seed)
    hidden = torch.randn(positions, width, generator=draw).to(settings.device).requires_grad_()
    weight = torch.randn(entries, width, generator=draw).mul(width**-0.5).to(settings.device).requires_grad_()
    targets = torch.randint(entries, (positions,), generator=draw).to(settings.device)

    def plain() -> Method:
        gigabytes = HELD * 4e-9 * positions * entries
        need_memory(gigabytes, settings, f"{HELD} tensors of {positions:,} x {entries:,} logits")
        call = partial(learned, lambda: F.cross_entropy(F.linear(hidden, weight), targets), hidden, weight)
        return Method(name=PLAIN, call=call, version=version_of("torch"))

    def own() -> Method:
        call = partial(learned, lambda: chunked_cross_entropy(hidden, weight, targets), hidden, weight)
        return Method(name=OURS, call=call, version=version_of("vqpipe"), ours=True)

    methods = offered({OURS: own, PLAIN: plain}, case)
    samples = stopwatch.measure(methods, case)
    case.rows = stopwatch.rows(methods, samples, positions)
    if PLAIN in samples:
        case.facts = {"largest_difference": difference(samples), "memory_wanted": MEMORY_WANTED}
        peaks = [samples[name].peak_mb for name in (OURS, PLAIN)]
        if peaks[0] is not None and peaks[1]:
            case.facts["memory_over_plain"] = peaks[0] / peaks[1]
    return case


def learned(loss_of: Callable[[], Tensor], *leaves: Tensor) -> list[Tensor]:
    """The loss and the gradients of the leaves."""
    loss = loss_of()
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def difference(samples: dict[str, Samples]) -> float:
    """The largest difference of loss or gradients between the two ways, in units of the largest value of each."""
    pairs = zip(samples[OURS].result, samples[PLAIN].result, strict=True)
    return max(float((ours - plain).abs().max() / plain.abs().max()) for ours, plain in pairs)


def compare_sampling(settings: Settings, tokens: int, images: int, stopwatch: Stopwatch) -> Case:
    """Time of the same draws both ways, and the share of ids that agree."""
    layers, heads, width = SIZES["tiny"]
    case = Case(
        title=sampling_title(tokens, images),
        unit="images",
        settings={"tokens": tokens, "images": images, "layers": layers, "width": width, "codebook_size": 1000},
    )
    torch.manual_seed(settings.seed)
    layout = TokenLayout(((tokens, 1),))
    space = Space(layout=layout, codebook_size=1000, latent_dim=8, code_dim=8, num_classes=10)
    model = Gpt(GptConfig(layers=layers, heads=heads, width=width), space).to(settings.device).eval()
    labels = (torch.arange(images) % 10).to(settings.device)

    def draws() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(settings.seed + number) for number in range(images)]

    methods = [
        Method(
            name=OURS,
            call=lambda: model.sample(labels, SAMPLING, draws()),
            version=version_of("vqpipe"),
            ours=True,
        ),
        Method(
            name=WHOLE,
            call=lambda: whole_sequence(model, labels, uniform_noise(draws(), tokens, settings.device)),
            version=version_of("torch"),
        ),
    ]
    samples = stopwatch.measure(methods, case)
    case.rows = stopwatch.rows(methods, samples, images)
    if WHOLE in samples:
        same = samples[OURS].result == samples[WHOLE].result
        case.facts = {"same_ids_as_whole": float(same.float().mean()), "speed_wanted": SPEED_WANTED}
    return case


@torch.no_grad()
def whole_sequence(model: Gpt, labels: Tensor, chances: Tensor) -> Tensor:
    """int64[B, N], the sequence run from its start for every id."""
    ids = labels.new_empty(len(labels), 0)
    for number in range(model.space.num_tokens):
        logits = model.logits(model.hidden(labels, ids)[:, -1])
        ids = torch.cat([ids, sample_ids(logits, chances[:, number], SAMPLING).unsqueeze(1)], dim=1)
    return ids
