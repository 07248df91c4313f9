"""Measure training steps of two presets at batch 32 (2 in a dry run), beside their plans -> one JSON file."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from stages.recipe import load_tokenizer
from vqpipe.losses import Objective
from vqpipe.losses.perceptual import Perceptual
from vqpipe.models import PatchDiscriminator, build_autoencoder
from vqpipe.planning.devices import device_of
from vqpipe.planning.estimate import step_seconds, tokenizer_training, without_masking
from vqpipe.quantizers.lc import FrozenCodebookQuantizer
from vqpipe.training.tokenizer_task import TokenizerTask
from vqpipe.weights import Frozen, build_lpips

DRY = bool(os.environ.get("DRY"))
PRESETS, BATCH = (("smoke",), 2) if DRY else (("vqgan-lc-f16-100k", "mgvq-f16-g4"), 32)
STEPS = 3 if DRY else 10


def measured(preset: str, precision: str, device: torch.device) -> dict[str, Any]:
    """Seconds of a step of both networks and peak bytes, planned and measured."""
    recipe = load_tokenizer(preset, [f"train.global_batch_size={BATCH}", f"train.precision={precision}"])
    training = tokenizer_training(recipe)
    profile = device_of(device)
    plan = training.plan(profile)
    step = training.trace(recipe.train, BATCH, profile.is_gpu)
    model = build_autoencoder(without_masking(recipe.model))
    quantizer = model.quantizer
    if isinstance(quantizer, FrozenCodebookQuantizer) and not quantizer.loaded:
        quantizer.load_codebook(torch.randn_like(quantizer.codes))
    objective = recipe.objective
    perceptual = None
    if objective.perceptual != "none":
        perceptual = Perceptual(objective.perceptual, network=Frozen(build_lpips(objective.perceptual)))
    discriminator = PatchDiscriminator(recipe.discriminator)
    for network in (model, discriminator):
        network.to(device)
        network.to(memory_format=torch.channels_last)
    task = TokenizerTask(
        model,
        discriminator,
        Objective(objective, model.quantizer.loss_names, perceptual=perceptual).to(device),
    )
    task.prepare(recipe.train, device, model)
    task.connect()
    side = recipe.data.image_size
    images = torch.rand(BATCH, 3, side, side, device=device) * 2 - 1
    times = []
    for number in range(STEPS):
        began = time.perf_counter()
        at = objective.disc_start + 1 + number
        reconstruction, _, _ = task.autoencoder_step(images, at)
        if task.objective.adversarial_at(at):
            task.discriminator_step(images, reconstruction, at)
        del reconstruction
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    result = {
        "preset": preset,
        "precision": precision,
        "batch": BATCH,
        "seconds_planned": step_seconds(step.operations, profile),
        "seconds_measured": sorted(times[1:])[len(times[1:]) // 2],
        "gigabytes_planned": sum(plan.memory.values()) / 1e9,
    }
    if device.type == "cuda":
        result["gigabytes_measured"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    return result


def main(target: Path) -> None:
    device = torch.device("cpu" if DRY else "cuda")
    rows = [measured(preset, each, device) for preset in PRESETS for each in (("fp32",) if DRY else ("fp32", "bf16"))]
    name = "cpu" if DRY else torch.cuda.get_device_name()
    table = {"device": name, "torch": torch.__version__, "steps": rows}
    target.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
