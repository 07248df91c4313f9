"""What a row of the log is made of: sums over the steps since the row before, kept on the device."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.metrics.usage import CodeUsage, usage_of
from vqpipe.quantizers import Quantizer
from vqpipe.training.history import Row


def first_of(values: float | list[float]) -> float:
    return values[0] if isinstance(values, list) else values


@dataclass
class Window:
    """Sums since the last row of the log; no step waits for them. Skipped steps count for the time alone."""

    quantizer: Quantizer
    device: torch.device
    sums: dict[str, Tensor] = field(default_factory=dict)
    """name -> (sum, number of steps), float64[2]."""
    steps: int = 0
    images: int = 0
    waited: float = 0.0
    """Seconds that the steps waited for images."""
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.usage = CodeUsage(self.quantizer.codebook_size, self.quantizer.num_groups, self.device)

    def add(self, values: dict[str, Tensor], ids: Tensor, images: int, bad: Tensor) -> None:
        """Take in one step: scalars by name, the ids int64[B, N] of this rank, and its number of images."""
        good = (~bad).double()
        for name, value in values.items():
            pair = torch.stack([torch.where(bad, 0.0, value.detach().double()), good])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair
        self.usage.update(torch.where(bad, -1, ids), trusted=True)
        self.steps += 1
        self.images += images * distributed.world_size()

    def row(self) -> Row:
        """Means over steps and ranks, NaN where every step was skipped. `psnr`, in dB, is that of the window's mean
        squared error; `utilization` and `perplexity` (of the first group) are those of all its tokens on all ranks."""
        seconds = time.perf_counter() - self.began
        names = sorted(self.sums)
        totals = distributed.all_reduce_sum(torch.stack([self.sums[name] for name in names]))
        means = dict(zip(names, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))
        counts = self.usage.merged()
        usage = usage_of(counts)
        row: Row = {
            **{name: value for name, value in means.items() if name != "squared_error"},
            "psnr": -10 * torch.tensor(means["squared_error"] / 4).log10().item(),
            "utilization": usage["utilization"],
            "perplexity": first_of(usage["perplexity_per_group"]),
            "window_tokens": int(counts[0].sum()),
            "images_per_second": self.images / seconds,
            "seconds_per_step": seconds / self.steps,
            "data_wait": self.waited / seconds,
        }
        if self.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        return row
