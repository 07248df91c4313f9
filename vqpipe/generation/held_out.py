"""What a generator or a classifier does on examples that it was not trained on.

Every rank takes its share, and all get the same numbers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.data.examples import Examples, TokenBatch, ordered
from vqpipe.generation.classifier import Classifier

SEED = 20_240
"""Of what a loss draws (times, noise, dropped classes): the same at every validation, so that these compare."""


@torch.no_grad()
def held_out_losses(
    network: nn.Module, examples: Examples, *, batch_size: int, device: torch.device, precision: str = "fp32"
) -> dict[str, float]:
    """Each scalar of the network's loss, its mean over the examples, in evaluation mode."""
    network.eval()
    sums: dict[str, Tensor] = {}
    for number, batch, counts in mine(examples, batch_size):
        torch.manual_seed(SEED + distributed.rank() + distributed.world_size() * number)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses = network(batch.examples.to(device), batch.labels.to(device))
        for name, value in losses.items() if counts else ():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu() * len(batch)
    shares = distributed.gather_objects({name: float(value) for name, value in sums.items()})
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: sum(share.get(name, 0.0) for share in shares) / len(examples) for name in names}


@torch.no_grad()
def accuracy(
    classifier: Classifier, examples: Examples, *, batch_size: int, device: torch.device, precision: str = "fp32"
) -> dict[str, float]:
    """`top1` and, beyond five classes, `top5`: the share of the examples whose class is first, or among the first five.

    A class that scores as high as the right one counts against it.
    """
    classifier.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for _, batch, counts_here in mine(examples, batch_size):
        labels = batch.labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = classifier.predict(batch.examples.to(device)).float()
        right = logits.gather(1, labels[:, None])
        better = (logits >= right).sum(1) - 1
        counts += torch.stack([(better < 1).sum(), (better < 5).sum()]) * counts_here
    top1, top5 = (distributed.all_reduce_sum(counts).double() / len(examples)).tolist()
    return {"top1": top1, "top5": top5} if classifier.num_classes > 5 else {"top1": top1}


def mine(examples: Examples, batch_size: int) -> Iterator[tuple[int, TokenBatch, bool]]:
    """This rank's batches: (number, batch, whether it counts).

    Ranks get as many each: one whose share is a batch shorter gets the first batch again, which does not count. A
    network that is split among ranks gathers its weights in every call, and would wait for the rank that makes none.
    """
    rank, ranks = distributed.rank(), distributed.world_size()
    rounds = -(-len(examples) // (batch_size * ranks))
    number = -1
    for number, batch in enumerate(ordered(examples, batch_size, rank, ranks)):
        yield number, batch, True
    for extra in range(number + 1, rounds):
        yield extra, next(ordered(examples, batch_size)), False
