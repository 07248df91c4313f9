"""Peak memory and time of real training steps on the CPU, for comparison with a plan. Run as a process of its own:

python tests/planning/measured.py PRESET BATCH PRECISION [THREADS]   -> {"bytes": ..., "seconds": ...}

`bytes` is the peak of resident memory over what was resident before the networks were built; `seconds` is the fastest
step but the first, of CPU time with one thread, which other processes do not change, and of wall time with more.
"""

import json
import sys
import time

import torch

from stages.recipe import load_tokenizer
from vqpipe.benchmarks.timing import high_water, reset_high_water
from vqpipe.losses.objective import Objective
from vqpipe.losses.perceptual import Perceptual
from vqpipe.models import PatchDiscriminator, build_autoencoder
from vqpipe.planning.steps import without_masking
from vqpipe.quantizers.lc import FrozenCodebookQuantizer
from vqpipe.training.tokenizer_run import TokenizerRecipe
from vqpipe.training.tokenizer_task import TokenizerTask
from vqpipe.weights import Frozen, build_lpips

STEPS = 3


def steps(recipe: TokenizerRecipe) -> list[float]:
    """Run training steps of all networks with random weights; the seconds of each."""
    model = build_autoencoder(without_masking(recipe.model))
    quantizer = model.quantizer
    if isinstance(quantizer, FrozenCodebookQuantizer) and not quantizer.loaded:
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
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for number in range(STEPS):
        images = torch.rand(recipe.train.global_batch_size, 3, side, side) * 2 - 1
        began = clock()
        step = number + config.disc_start
        reconstruction, _, _ = task.autoencoder_step(images, step)
        if objective.adversarial_at(step):
            task.discriminator_step(images, reconstruction, step)
        del reconstruction
        times.append(clock() - began)
    return times


def main(preset: str, batch: str, precision: str, threads: str = "1") -> None:
    torch.set_num_threads(int(threads))
    settings = [f"train.precision={precision}", f"train.global_batch_size={batch}"]
    recipe = load_tokenizer(preset, settings)
    if recipe.objective.perceptual != "none":
        import lpips  # noqa: F401
    before = reset_high_water()
    times = steps(recipe)
    print(json.dumps({"bytes": high_water() - (before or 0.0), "seconds": min(times[1:])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
