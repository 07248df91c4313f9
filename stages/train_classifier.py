"""`vqpipe train-classifier`: tokens with labels, their tokenizer -> classifier, with its top-1 on held-out tokens."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console
from stages import examples as shared
from stages.console import Device, Out, Preset, Seed, Set

if TYPE_CHECKING:
    import torch
    from torch import nn

    from stages.recipe import ClassifierRecipe
    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.data.examples import Examples
    from vqpipe.generation.classifier import Classifier
    from vqpipe.tokenizer import Tokenizer
    from vqpipe.training.checkpoint import TrainState

SECTIONS = ("classifier", "examples", "train")
"""What of a preset this stage reads."""
NOTHING_HELD_OUT = "no images were held out. Name their tokens with --validation, or set examples.held_out."


def train_classifier(
    tokens: Annotated[Path, typer.Option("--tokens", help="A tokens artifact, with labels.", metavar="DIR")],
    tokenizer: shared.Given,
    out: Out,
    preset: Preset = None,
    steps: console.Steps = None,
    global_batch_size: console.GlobalBatchSize = None,
    precision: console.TrainPrecision = None,
    validation: shared.HeldOutTokens = None,
    log: console.Log = None,
    overrides: Set = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Train a classifier of token maps: how much of an image's class is left?

    Top-1 and top-5 are measured on tokens that were not trained on: those
    named with --validation, all of them, else examples.held_out of --tokens.
    They are in metrics.json, with the name of the recipe, which is ours: the
    paper gives none. vit-b starts from MAE's weights where it is given them:
    --set classifier.weights=mae_pretrain_vit_base.pth

    Run the same command again to resume it. To watch a run, open
    OUT.partial/report.html.
    """
    with console.session(device, seed) as where:
        from stages import recipe as recipes
        from vqpipe import artifacts
        from vqpipe.errors import ConfigError
        from vqpipe.tokenizer import Tokenizer
        from vqpipe.training.loggers import check_loggers

        if preset is None:
            raise ConfigError("no preset was named", "Choose one from `vqpipe presets`, such as --preset vit-tiny")
        check_loggers(log or [])
        flags = {"steps": steps, "global_batch_size": global_batch_size, "precision": precision}
        recipe = recipes.load_classifier(preset, overrides, train=flags)
        shared.check_schedule(recipe.train, bool(validation or recipe.examples.held_out))
        opened = Tokenizer.from_pretrained(tokenizer, where)
        stored = shared.open_tokens(tokens, opened)
        others = None if validation is None else shared.open_tokens(validation, opened)
        shared.check_alike(stored, others)
        draft = artifacts.start(out, "classifier", request_of(recipe, seed), inputs_of(recipe, stored, others, opened))
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            loggers = list(dict.fromkeys(log or []))
            return console.finished(run(recipe, draft, stored, others, opened, loggers, seed, where))


def request_of(recipe: "ClassifierRecipe", seed: int) -> dict[str, Any]:
    """What is asked; pretrained weights count by content, as an input."""
    return shared.asked({name: getattr(recipe, name) for name in SECTIONS}, seed)


def inputs_of(
    recipe: "ClassifierRecipe", stored: "Artifact", others: "Artifact | None", tokenizer: "Tokenizer"
) -> dict[str, Any]:
    """What the run reads, by role.

    Raises:
        WeightsError: there are no such weights.
    """
    from vqpipe.errors import WeightsError
    from vqpipe.files import hash_file
    from vqpipe.generation.classifier import VitConfig

    inputs: dict[str, Any] = {"tokens": stored, "tokenizer": tokenizer.source}
    if others is not None:
        inputs["validation"] = others
    if isinstance(recipe.classifier, VitConfig) and recipe.classifier.weights is not None:
        file = recipe.classifier.weights
        if not file.is_file():
            raise WeightsError(f"{file} does not exist", "Fetch mae_pretrain_vit_base.pth, published by MAE's authors")
        inputs["weights"] = hash_file(file)
    return inputs


def run(
    recipe: "ClassifierRecipe",
    draft: "Draft",
    stored: "Artifact",
    others: "Artifact | None",
    tokenizer: "Tokenizer",
    loggers: list[str],
    seed: int,
    device: "torch.device",
) -> "Artifact":
    """Build the classifier, train it in `draft`, measure, publish."""
    from functools import partial

    import numpy as np
    import torch

    from vqpipe import distributed
    from vqpipe.config import to_table
    from vqpipe.data.examples import TokenSet
    from vqpipe.generation.base import Space
    from vqpipe.generation.classifier import build_classifier
    from vqpipe.tokenizer import latent_size

    quantizer, size = tokenizer.autoencoder.quantizer, int(stored.facts["image_size"])
    everything = TokenSet(stored, draft.path)
    named = None if others is None else TokenSet(others, draft.path)
    examples, held_out = shared.split(everything, recipe.examples, named, recipe.train.validation_images)
    num_classes = recipe.examples.classes_of(everything.labels)
    if named is not None:
        recipe.examples.classes_of(named.labels)
    space = Space.of(quantizer, *latent_size(size, size, tokenizer.downsample_factor), num_classes)
    torch.manual_seed(seed)  # what was read before may have drawn random numbers
    classifier = build_classifier(recipe.classifier, space).to(device)
    if classifier.needs_codebook:
        classifier.load_codebook(quantizer.all_codes())
    parameters = sum(parameter.numel() for parameter in classifier.parameters())
    console.say(f"{recipe.classifier.kind}: {parameters:,} parameters, {len(examples):,} images, {num_classes} classes")
    state = shared.learn(
        draft,
        classifier,
        examples,
        recipe.train,
        mirror=recipe.examples.mirror,
        seed=seed,
        device=device,
        what=f"{recipe.classifier.kind} on tokens, {parameters / 1e6:,.1f} M parameters, {num_classes} classes.",
        validate=None if held_out is None else partial(validated, held_out, recipe, device),
        settings={name: to_table(getattr(recipe, name)) for name in SECTIONS},
        loggers=loggers,
    )
    metrics = report(recipe, classifier, state, named or held_out, device, seen=len(np.unique(everything.labels)))
    weights = state.published()
    if distributed.is_main():
        save(draft, classifier, weights, size, metrics)
    facts = {"kind": recipe.classifier.kind, "num_parameters": parameters, "num_classes": num_classes}
    facts |= {name: metrics[name] for name in ("top1", "top5") if name in metrics}
    return draft.publish(facts | {"images_seen": state.images_seen, "steps": state.step})


def validated(held_out: "Examples", recipe: "ClassifierRecipe", device: "torch.device", network: Any) -> Any:
    """Loss and accuracy on held-out examples."""
    from vqpipe import distributed
    from vqpipe.generation.held_out import accuracy, held_out_losses

    size = recipe.train.share(distributed.world_size()) // recipe.train.accumulate
    options: dict[str, Any] = {"batch_size": size, "device": device, "precision": recipe.train.precision}
    losses = held_out_losses(network, held_out, **options)
    return {"total": losses["total"]} | accuracy(network, held_out, **options)


def report(
    recipe: "ClassifierRecipe",
    classifier: "Classifier",
    state: "TrainState",
    held_out: "Examples | None",
    device: "torch.device",
    *,
    seen: int,
) -> dict[str, Any]:
    """The content of metrics.json: accuracies of the weight average on all held-out examples.

    `seen` is how many classes occur: labels may be a few of ImageNet's thousand, and a guess is among those few.
    """
    from vqpipe.generation.classifier import RECIPE

    metrics: dict[str, Any] = {
        "recipe": RECIPE,
        "num_classes": classifier.num_classes,
        "num_classes_seen": seen,
        "chance": 1 / seen,
        "num_images": 0 if held_out is None else len(held_out),
        "not_computed": {},
    }
    if held_out is None:
        metrics["not_computed"] = dict.fromkeys(("top1", "top5"), NOTHING_HELD_OUT)
        return metrics
    network: nn.Module = state.weight_ema.network
    metrics |= {name: value for name, value in validated(held_out, recipe, device, network).items() if name != "total"}
    if "top5" not in metrics:
        metrics["not_computed"]["top5"] = f"there are {classifier.num_classes} classes"
    return metrics


def save(
    draft: "Draft",
    classifier: "Classifier",
    weights: "dict[str, torch.Tensor]",
    image_size: int,
    metrics: dict[str, Any],
) -> None:
    """Write the classifier's files into the draft."""
    from safetensors.torch import save_file

    from vqpipe.config import to_table

    table = {"classifier": to_table(classifier.config), "space": classifier.space.to_table(), "image_size": image_size}
    with draft.write("model.safetensors") as path:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path)
    with draft.write("config.json") as path:
        path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    with draft.write("metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    draft.adopt("metrics.jsonl")
