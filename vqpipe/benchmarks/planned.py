"""The estimates of `vqpipe plan` for what is measured: numbers for the `extra` of a measurement.

planned_ms   milliseconds of a call, or of a step of it
planned_mb   peak of memory above what is allocated before, 10^6 bytes
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vqpipe.benchmarks.timing import Settings
from vqpipe.codebooks.kmeans import KmeansConfig
from vqpipe.models import AutoencoderConfig
from vqpipe.planning.devices import device_of
from vqpipe.planning.estimate import micro_batch, plan_kmeans, plan_tokenize, step_seconds
from vqpipe.planning.steps import fake_tensors, trace_tokenizer
from vqpipe.search import nearest
from vqpipe.training.tokenizer_run import TokenizerRecipe

Planned = Mapping[str, float]


def numbers(seconds: float, num_bytes: float) -> Planned:
    """Both estimates."""
    return {"planned_ms": 1e3 * seconds, "planned_mb": num_bytes / 1e6}


def planned_search(vectors: Tensor, codes: Tensor) -> Planned:
    """Of a search of float32[N, D] among float32[K, D]."""
    device = device_of(vectors.device)
    with fake_tensors(device.is_gpu) as (trace, _):
        inputs = torch.empty(vectors.shape), torch.empty(codes.shape)
        for each in inputs:
            trace.add(each, "inputs")
        trace.operations.clear()
        trace.peak.clear()
        nearest(*inputs, check=False)
    peak = sum(trace.peak.values()) - sum(each.nbytes for each in inputs)
    return numbers(step_seconds(trace.operations, device), peak)


def planned_iteration(num_points: int, dim: int, k: int, settings: Settings) -> Planned:
    """Of a Lloyd iteration; its memory is that of a whole job, and is left out."""
    plan = plan_kmeans(KmeansConfig(k=k), num_points, dim, device_of(settings.device))
    return {"planned_ms": 1e3 * plan.seconds_per_step}


def planned_step(recipe: TokenizerRecipe, settings: Settings, *resident: nn.Module) -> Planned:
    """Of a training step with both networks, which are in memory before."""
    device = device_of(settings.device)
    step = trace_tokenizer(recipe, micro_batch(recipe.train, 1), device.is_gpu)
    return numbers(step_seconds(step.operations, device), sum(step.peak.values()) - size_of_tensors(*resident))


def planned_encoding(
    model: AutoencoderConfig, size: int, batch: int, settings: Settings, resident: nn.Module
) -> Planned:
    """Of encoding a batch of images of `size` x `size` pixels by a network that is in memory before."""
    plan = plan_tokenize(model, (size, size), batch, device_of(settings.device))
    return numbers(plan.seconds_per_step, sum(plan.memory.values()) - size_of_tensors(resident))


def size_of_tensors(*networks: nn.Module) -> float:
    """Bytes of their weights and buffers."""
    return sum(each.nbytes for network in networks for each in (*network.parameters(), *network.buffers()))
