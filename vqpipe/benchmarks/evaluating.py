"""What an evaluation costs beside the encoding and decoding that it cannot do without.

Either way the same batches, decoded from files beforehand, go through the same network. One way stops at the pictures
that come out; the other is the whole measuring pass of an evaluation without pretrained networks: every convention of
PSNR and SSIM that its protocol tells, the digest of the originals, and the use of codes.
"""

import statistics
from functools import partial

import torch
from torch import Tensor

from vqpipe.benchmarks import networks
from vqpipe.benchmarks.measure import Case, Method, Plan, Samples, Settings, Stopwatch, version_of
from vqpipe.evaluation.measurement import EvaluationMetrics
from vqpipe.metrics import EvalConfig
from vqpipe.metrics.networks import FeatureNetworks
from vqpipe.models import AutoencoderConfig
from vqpipe.tokenizer import Tokenizer

WANTED = 1.3
"""What the measuring pass may take at the most, in units of encoding and decoding alone."""
OURS, PLAIN = "vqpipe eval", "encode and decode alone"
QUICK_SIZE = 64


def plans(settings: Settings, small: AutoencoderConfig, published: AutoencoderConfig) -> list[Plan]:
    """A network that trains on a CPU, and one of the papers; a quick look is at the first alone."""
    on_gpu = settings.device.type == "cuda"
    if settings.quick:
        return [plan(settings, small, 2, QUICK_SIZE, "a small network")]
    return [
        plan(settings, small, 64 if on_gpu else 16, 128, "a small network"),
        plan(settings, published, 32 if on_gpu else 1, 256, "the papers' f16 network"),
    ]


def plan(settings: Settings, config: AutoencoderConfig, batch: int, size: int, network: str) -> Plan:
    title = f"evaluation: {network}, {batch} images of {size} px"
    return Plan(title, 2, partial(compare, settings, config, batch, size, title))


def compare(
    settings: Settings, config: AutoencoderConfig, batch: int, size: int, title: str, stopwatch: Stopwatch
) -> Case:
    """The same pictures measured, and only made."""
    case = Case(title=title, unit="images", settings={"batch": batch, "image_size": size, "protocol": "adm"})
    model = networks.build(config, size, settings.device, settings.seed)
    tokenizer = Tokenizer(model, image_size=size, device=settings.device)
    images = networks.photographs(batch, size).to(settings.device)
    methods = [
        Method(name=OURS, call=partial(measured, tokenizer, images), version=version_of("vqpipe"), ours=True),
        Method(name=PLAIN, call=partial(made, tokenizer, images), version=version_of("torch")),
    ]
    samples = stopwatch.measure(methods, case)
    case.rows = stopwatch.rows(methods, samples, batch)
    if PLAIN in samples:
        wall, cpu = over_plain(samples[OURS], samples[PLAIN])
        case.facts = {"eval_over_plain": wall, "eval_over_plain_cpu": cpu, "eval_wanted": WANTED}
    return case


@torch.no_grad()
def made(tokenizer: Tokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8[B, 3, H, W] -> float[B, 3, H, W] of about [-1, 1], and ids."""
    ids = tokenizer.encode(images)
    again = tokenizer.decode_float(ids, (images.shape[2], images.shape[3]))
    return again, ids


@torch.no_grad()
def measured(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """One batch through everything an evaluation without pretrained networks does; each image's PSNR, float64[B]."""
    absent = FeatureNetworks(perceptual={}, inception=None, sha256={}, absent={})
    evaluation = EvaluationMetrics(
        EvalConfig(), absent, tokenizer.codebook_size, tokenizer.num_groups, tokenizer.device
    )
    again, ids = made(tokenizer, images)
    return evaluation.update(images, again, ids, positions=range(len(images)))


def over_plain(ours: Samples, plain: Samples) -> tuple[float, float]:
    """Wall and CPU time of ours over the plain way's: medians of the ratios within each round."""
    pairs = ((ours.wall, plain.wall), (ours.cpu, plain.cpu))
    wall, cpu = (statistics.median(a / b for a, b in zip(*pair, strict=False)) for pair in pairs)
    return wall, cpu
