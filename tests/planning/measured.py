"""Peak memory and time of real training steps, for comparison with a plan. Run as a process of its own:

python tests/planning/measured.py PRESET BATCH [SETTING...]   -> {"bytes": ..., "seconds": ...}
"""

import json
import sys
import time
from dataclasses import replace

import torch

from stages.recipe import load_tokenizer
from vqpipe.benchmarks.timing import high_water, reset_high_water
from vqpipe.losses.objective import Objective
from vqpipe.losses.perceptual import Perceptual
from vqpipe.models import PatchDiscriminator, build_autoencoder
from vqpipe.planning.estimate import without_masking
from vqpipe.training.tokenizer_run import TokenizerRecipe
from vqpipe.training.tokenizer_task import TokenizerTask
from vqpipe.weights import Frozen, build_lpips


def steps(recipe: TokenizerRecipe, count: int) -> float:
    """Run `count` training steps of the networks with random weights; seconds of the fastest but the first."""
    model = build_autoencoder(without_masking(recipe.model))
    quantizer = model.quantizer
    if getattr(quantizer, "loaded", True) is False:
        quantizer.load_codebook(torch.randn_like(quantizer.codes))
    config = recipe.objective
    perceptual = None
    if config.perceptual != "none":
        perceptual = Perceptual(config.perceptual, network=Frozen(build_lpips(config.perceptual)))
    objective = Objective(config, quantizer.loss_names, perceptual=perceptual)
    task = TokenizerTask(model, PatchDiscriminator(recipe.discriminator), objective)
    task.prepare(recipe.train, torch.device("cpu"), model)
    task.connect()
    side, times = recipe.data.image_size, []
    for number in range(count):
        images = torch.rand(recipe.train.global_batch_size, 3, side, side) * 2 - 1
        began = time.perf_counter()
        step = number + config.disc_start
        reconstruction, _, _ = task.autoencoder_step(images, step)
        if objective.adversarial_at(step):
            task.discriminator_step(images, reconstruction, step)
        del reconstruction
        times.append(time.perf_counter() - began)
    return min(times[1:])


def main(preset: str, batch: int, settings: list[str]) -> None:
    torch.set_num_threads(1)
    recipe = load_tokenizer(preset, ["train.precision=fp32", f"train.global_batch_size={batch}", *settings])
    small = load_tokenizer("smoke", ["train.precision=fp32", "train.global_batch_size=1"])
    steps(replace(small, objective=replace(small.objective, disc_start=0)), 2)  # loads what PyTorch loads on first use
    if recipe.objective.perceptual != "none":
        import lpips  # noqa: F401
    before = reset_high_water()
    seconds = steps(recipe, 4)
    print(json.dumps({"bytes": high_water() - (before or 0.0), "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
