"""What a trace counts, against numbers by hand."""

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vqpipe.planning.trace import CudaAutocast, Trace
from vqpipe.search import nearest

MEGA = 2**20


def test_the_memory_of_a_step_is_that_of_a_count_by_hand() -> None:
    """Two layers of 1024 x 1024 and 256 vectors: every number is a multiple of 1 MiB."""
    with FakeTensorMode(), Trace(gpu=True) as trace:
        with trace.inside("weights"):
            network = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.ReLU(), nn.Linear(1024, 1024, bias=False))
        trace.own(network, "weights")
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        trace.count_calls(optimizer, "step", "optimizer")
        vectors = torch.empty(256, 1024)
        network(vectors).square().mean().backward()
        assert trace.live["weights"] == 8 * MEGA
        assert trace.live["gradients"] == 8 * MEGA
        assert trace.live["activations"] == MEGA  # the vectors: the graph is gone
        optimizer.step()
        assert 16 * MEGA <= trace.live["optimizer"] <= 16 * MEGA + 64
        trace.operations.clear()
        optimizer.zero_grad()
        assert trace.live["gradients"] == 0
        output = network(vectors)
        saved = trace.live["activations"]
        assert 3 * MEGA <= saved <= 4 * MEGA  # the vectors, the hidden vectors, the output
        del output
        products = [each for each in trace.operations if each.flops]
        assert [each.flops for each in products] == 2 * [2.0 * 256 * 1024 * 1024]
        assert not any(each.backward for each in products)


def test_on_a_cpu_small_tensors_that_come_and_go_leave_gaps_in_the_heap() -> None:
    with FakeTensorMode(), Trace(gpu=False) as trace:
        network = nn.Linear(1024, 1024, bias=False)
        trace.own(network, "weights")
        assert trace.live["heap"] == 0
        small, large = torch.empty(10 * 2**18), torch.empty(2**23)  # 10 and 32 MiB
        assert trace.live["heap"] == 3 * MEGA
        del small
        assert trace.live["heap"] == 0
        del large
    assert trace.peak == {"weights": 4 * MEGA, "activations": 42 * MEGA, "heap": 3 * MEGA}


def test_nothing_is_allocated() -> None:
    with FakeTensorMode(), Trace(gpu=True) as trace:
        large = torch.empty(2**40) + 1
        assert trace.live["activations"] == 4 * 2**40
        assert sum(trace.peak.values()) == 8 * 2**40
        del large
    assert trace.live["activations"] == 0


def test_the_search_needs_memory_for_candidates_on_a_gpu_and_two_operations_per_term() -> None:
    peaks = {}
    for gpu in (False, True):
        with FakeTensorMode(), Trace(gpu=gpu) as trace:
            vectors, codes = torch.empty(65_536, 8), torch.empty(100_000, 8)
            assert nearest(vectors, codes, check=False).shape == (65_536,)
        peaks[gpu] = trace.peak.get("search", 0)
        assert trace.live["search"] == 0
        (search,) = [each for each in trace.operations if each.flops]
        assert search.flops == 2.0 * 65_536 * 100_000 * (64 if gpu else 8)
    assert peaks[False] == 0
    assert 65_536 * 264 <= peaks[True] < 3 * 65_536 * 264


def test_norms_under_autocast_give_float32_as_on_cuda() -> None:
    images = torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.group_norm(images, 2).dtype == torch.bfloat16
        with CudaAutocast():
            assert F.group_norm(images, 2).dtype == torch.float32
            assert nn.GroupNorm(2, 4)(images).dtype == torch.float32
            assert nn.Conv2d(4, 4, 1)(images).dtype == torch.bfloat16
