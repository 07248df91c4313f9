"""The jobs of `vqpipe train-generator` and `vqpipe train-classifier`: train a network on stored tokens or latents.

Both have the same steps: check and open the inputs, start the draft, read the examples, build the network, train it
(`train_on_examples`), publish it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from vqpipe import artifacts, distributed
from vqpipe.artifacts import Artifact, Draft
from vqpipe.config import to_request, to_table
from vqpipe.data.examples import (
    Examples,
    ExamplesConfig,
    ExampleStream,
    Subset,
    TokenSet,
    split_held_out,
)
from vqpipe.data.latents import LatentStatistics, open_latents
from vqpipe.data.tokens import sizes_text
from vqpipe.errors import ArtifactError, ConfigError, DataError, WeightsError
from vqpipe.files import hash_file
from vqpipe.generation.base import Generator, GeneratorConfig, SamplingConfig, Space, build_generator, check_used
from vqpipe.generation.classifier import RECIPE, Classifier, ClassifierConfig, build_classifier
from vqpipe.generation.image_generator import ImageGenerator, image_rngs, write_generator, write_weights
from vqpipe.generation.validation import loss_and_accuracy, validation_losses
from vqpipe.image_size import fixed_size
from vqpipe.model_input import latent_size
from vqpipe.reports.pictures import contact_sheet
from vqpipe.tokenizer import Tokenizer
from vqpipe.training.callbacks import Callback, HeldOutMetrics, MetricsLog, SampleSheet
from vqpipe.training.checkpoint import TrainState
from vqpipe.training.config import TrainConfig
from vqpipe.training.examples_task import ExamplesTask
from vqpipe.training.run import Run
from vqpipe.words import counted

SHEET_IMAGES, SHEET_COLUMNS = 16, 4
"""Samples drawn during training."""
NOTHING_HELD_OUT = "no images were held out. Name their tokens with --validation, or set examples.held_out."


@dataclass(frozen=True, kw_only=True)
class GeneratorRecipe:
    """The sections of a generator's preset."""

    generator: GeneratorConfig
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_used(self.generate, SamplingConfig(), self.generator)


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe:
    """The sections of a classifier's preset."""

    classifier: ClassifierConfig
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


ExamplesRecipe = GeneratorRecipe | ClassifierRecipe
NetworkT = TypeVar("NetworkT", Generator, Classifier)


@dataclass(frozen=True)
class StoredExamples:
    """The artifacts that a run reads.

    Raises:
        ArtifactError: another tokenizer made them, or those of the validation images have another shape.
        ConfigError: they are of images of native sizes.
    """

    tokenizer: Tokenizer
    artifact: Artifact
    """Tokens or latents."""
    validation: Artifact | None = None
    """The same of validation images."""
    limit: int | None = None
    """Only the first so many images of `artifact`."""

    def __post_init__(self) -> None:
        for artifact in filter(None, (self.artifact, self.validation)):
            if "sizes" in artifact.facts:
                what = f"{artifact.path} has images of their own sizes: {sizes_text(artifact)}"
                raise ConfigError(f"{what}; one size is trained on", "Tokenize with one number as --image-size")
        self.tokenizer.check_made(self.artifact)
        if self.validation is None:
            return
        self.tokenizer.check_made(self.validation)
        latents = self.artifact.kind == "latents"
        fact, name = ("latent_shape", "shape of latents") if latents else ("layout", "layout of ids")
        if self.validation.facts[fact] != self.artifact.facts[fact]:
            raise ArtifactError(
                f"{self.validation.path} has another {name} than {self.artifact.path}",
                "Encode both at the same image size",
            )

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the encoded images, pixels."""
        return fixed_size(self.artifact.facts["image_size"])

    @property
    def image_size(self) -> int:
        """Side of the encoded images of a generator, pixels.

        Raises:
            ConfigError: they are not squares.
        """
        height, width = self.size
        if height != width:
            raise ConfigError(
                f"{self.artifact.path} is of images of {width}x{height}, and generators are for squares",
                "Tokenize with one number as --image-size",
            )
        return width

    @property
    def num_images(self) -> int:
        """Images that are trained on or held out."""
        stored = int(self.artifact.facts["num_images"])
        return stored if self.limit is None else min(self.limit, stored)

    def inputs(self) -> dict[str, Any]:
        """Return the inputs of the artifact to publish, by role."""
        inputs = {self.artifact.kind: self.artifact, "tokenizer": self.tokenizer.source}
        return inputs if self.validation is None else inputs | {"validation": self.validation}


@dataclass(frozen=True, kw_only=True)
class ExampleData:
    """The examples of a run."""

    space: Space
    train: Examples
    validation: Examples | None
    """Examples that are not trained on, if any."""
    validation_subset: Examples | None
    """The validation examples measured during training: all that `examples.held_out` holds out, or
    `train.validation_images` of those that --validation names."""
    classes: tuple[int, ...]
    """Labels of all stored examples, in ascending order."""
    statistics: LatentStatistics | None
    """Normalization of latents."""


def check_validation(recipe: ExamplesRecipe, validation: Path | None) -> None:
    """Raise a ConfigError if validation is scheduled without images, or if two settings name images for it."""
    if recipe.train.validate_every and validation is None and not recipe.examples.held_out:
        raise ConfigError(
            f"train.validate_every = {recipe.train.validate_every} needs held-out images",
            "Name their tokens with --validation, or set examples.held_out, or train.validate_every=0 for none",
        )
    if validation is not None and recipe.examples.held_out:
        raise ConfigError(
            f"examples.held_out = {recipe.examples.held_out} and --validation both name held-out images",
            "Set examples.held_out=0",
        )


def start_examples_run(out: Path, recipe: ExamplesRecipe, stored: StoredExamples, seed: int) -> Draft | Artifact:
    """Start or resume the `generator` or `classifier` artifact `out`, or return it if it is published.

    Pretrained weights of a classifier are an input, by their content.

    Raises:
        ConfigError: the classifier fine-tunes pretrained weights, and none are given.
        WeightsError: the file of pretrained weights does not exist.
    """
    kind, inputs = "generator" if isinstance(recipe, GeneratorRecipe) else "classifier", stored.inputs()
    classifier = getattr(recipe, "classifier", None)
    weights = getattr(classifier, "weights", None)
    if weights is None and getattr(classifier, "pretrained", False):
        raise ConfigError(
            "this preset fine-tunes pretrained weights, and classifier.weights is not set",
            "Set classifier.weights=mae_pretrain_vit_base.pth, published by MAE's authors, or train from scratch with "
            "classifier.pretrained=false",
        )
    if weights is not None:
        if not weights.is_file():
            raise WeightsError(
                f"{weights} does not exist", "Fetch mae_pretrain_vit_base.pth, published by MAE's authors"
            )
        inputs["weights"] = hash_file(weights)
    limit = {} if stored.limit is None else {"limit": stored.limit}
    return artifacts.start(out, kind, {**to_request(recipe), "seed": seed, **limit}, inputs)


def read_data(run: Run, recipe: ExamplesRecipe, stored: StoredExamples) -> ExampleData:
    """Read the stored examples, split them, and derive the space of the network.

    Raises:
        DataError: labels are missing or out of range, or too many examples are held out.
        ArtifactError: a file is damaged, or the labels of the validation images mean other classes.
    """
    config = recipe.examples
    run.progress.start(f"reading the {stored.artifact.kind}", None, unit="")
    everything, statistics = read_examples(run, stored.artifact, config.raw)
    if stored.limit is not None and stored.limit < len(everything):
        everything = Subset(everything, np.arange(stored.limit))
    num_classes = config.num_classes_of(everything.labels, stored.artifact.facts.get("unlabeled", ""))
    if stored.validation is None:
        examples, subset = split_held_out(everything, config.held_out)
        validation: Examples | None = subset
    else:
        examples = everything
        validation, _ = read_examples(run, stored.validation, config.raw, statistics)
        count = min(recipe.train.validation_images, len(validation))
        subset = Subset(validation, np.linspace(0, len(validation) - 1, count).round().astype(np.int64))
        config.num_classes_of(validation.labels, stored.validation.facts.get("unlabeled", ""))  # checks them
        if num_classes is not None:
            check_class_names(stored.artifact, stored.validation)
            if (highest := int(validation.labels.max(initial=-1))) >= num_classes:
                raise DataError(
                    f"{stored.validation.path} has the label {highest}, those of the training images are below"
                    f" {num_classes}",
                    f"Set examples.num_classes={highest + 1}",
                )
    side = latent_size(*stored.size, stored.tokenizer.downsample_factor)
    quantizer = stored.tokenizer.autoencoder.quantizer
    return ExampleData(
        space=Space.of(quantizer, *side, num_classes),
        train=examples,
        validation=validation,
        validation_subset=subset,
        classes=tuple(np.unique(everything.labels).tolist()),
        statistics=statistics,
    )


def check_class_names(training: Artifact, validation: Artifact) -> None:
    """Raise an ArtifactError if a label is another class in `validation`. The names of classes may be unknown."""
    names = (artifact.facts.get("class_names", []) for artifact in (training, validation))
    for label, (trained, measured) in enumerate(zip(*names, strict=False)):
        if trained != measured:
            raise ArtifactError(
                f"label {label} is the class {trained} in {training.path}, and {measured} in {validation.path}",
                "Prepare both from one list of classes, classes.txt in each folder of images, and encode them again",
            )


def read_examples(
    run: Run, artifact: Artifact, raw: bool, statistics: LatentStatistics | None = None
) -> tuple[Examples, LatentStatistics | None]:
    """Read tokens or latents, and the statistics by which latents are normalized: `statistics`, or their own."""
    if artifact.kind == "tokens":
        return TokenSet(artifact, run.draft.path), None
    latents = open_latents(artifact.path, raw=raw)
    latents.statistics = statistics or latents.statistics
    shards = artifact.names("latents-*.npy")  # memory-mapped later, so hashed now: a flipped bit would be trained on
    artifact.verify_files(shards, run.progress)
    return latents, latents.statistics


def train_on_examples(
    run: Run,
    network: nn.Module,
    data: ExampleData,
    recipe: ExamplesRecipe,
    *,
    description: str,
    measure: Callable[..., dict[str, float]],
    sample_sheet: Callable[[nn.Module], bytes] | None = None,
) -> tuple[TrainState, MetricsLog]:
    """Train a network on examples in the draft, with its log, page and validations. Every rank calls it.

    `network(examples, labels)` returns losses by name; see `ExamplesTask`.

    Args:
        description: one line for the page of the run.
        measure: weight average and validation examples, with the options of `measuring` -> numbers by name.
        sample_sheet: weight average -> samples as a PNG file.
    """
    measures: list[Callback] = []
    if sample_sheet is not None:
        measures.append(SampleSheet(run.draft, sample_sheet, all_ranks=recipe.train.parallel == "fsdp"))
    if data.validation_subset is not None:
        on_subset = partial(measure, examples=data.validation_subset, **measuring(run, recipe))
        measures.append(HeldOutMetrics(on_subset, run.progress))
    stream = ExampleStream(
        data.train,
        seed=run.seed,
        batch_size=recipe.train.global_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        flip=recipe.examples.mirror,
    )
    return run.train(ExamplesTask(network), recipe, stream, measures, description)


def initialize(run: Run, tokenizer: Tokenizer, build: Callable[[], NetworkT]) -> NetworkT:
    """Return the network of `build`, seeded, on the run's device, with the tokenizer's codebook if it needs one."""
    run.progress.start("building the network", None, unit="")
    torch.manual_seed(run.seed)  # reading the inputs may have consumed random numbers
    network = build().to(run.device)
    if network.needs_codebook:
        network.load_codebook(tokenizer.autoencoder.quantizer.all_codes())
    return network


def train_generator(run: Run, recipe: GeneratorRecipe, stored: StoredExamples) -> Artifact | None:
    """Train a generator and publish it. Every rank calls it.

    Returns None if `stop_requested` ended the run early: a checkpoint is saved, and the same call resumes.
    """
    data, tokenizer = read_data(run, recipe, stored), stored.tokenizer
    generator = initialize(run, tokenizer, lambda: build_generator(recipe.generator, data.space))
    sampling = recipe.generate
    if data.space.num_classes is None and sampling.cfg_scale != 1:
        run.progress.message(
            f"sampling without guidance, which needs classes: generate.cfg_scale is 1, not {sampling.cfg_scale:g}"
        )
        sampling = replace(sampling, cfg_scale=1.0)
    images = ImageGenerator(
        generator=generator,
        tokenizer=tokenizer,
        image_size=stored.image_size,
        classes=() if data.space.num_classes is None else tuple(np.unique(data.train.labels).tolist()),
        sampling=sampling,
        statistics=data.statistics,
    )
    first, rngs = torch.zeros(1, dtype=torch.int64), image_rngs(run.seed, range(1))
    generator.check_sampling(first, sampling, rngs)  # invalid settings fail here, not at the first samples
    images.sample(first, replace(sampling, steps=min(sampling.steps, 2)), rngs)
    description = introduce(run, generator, generator.trained_on, len(data.train))

    def sample_sheet(network: Any) -> bytes:
        """The same seeds and classes each time."""
        classes = images.classes or (0,)
        spread = [i * max(1, len(classes) // SHEET_IMAGES) % len(classes) for i in range(SHEET_IMAGES)]
        labels = torch.tensor([classes[i] for i in spread])
        averaged = replace(images, generator=network.eval())
        samples = averaged.sample(labels, images.sampling, image_rngs(run.seed, range(SHEET_IMAGES)))
        return contact_sheet(samples, SHEET_COLUMNS)

    state, metrics = train_on_examples(
        run,
        generator.requires_grad_(True),
        data,
        recipe,
        description=description,
        measure=validation_losses,
        sample_sheet=sample_sheet,
    )
    if state.step < recipe.train.steps:
        return None
    weights = state.published()
    if distributed.is_main():
        write_generator(run.draft, images, weights)
        run.draft.record_existing("metrics.jsonl")
    losses = {"training_loss": metrics.latest("loss/total"), "valid_loss": metrics.latest("valid/total", state.step)}
    measured = {name: value for name, value in losses.items() if value is not None}
    parameters, num_classes = count_parameters(generator), data.space.num_classes
    facts = {"kind": generator.config.kind, "num_parameters": parameters, "num_classes": num_classes}
    return run.draft.publish(facts | {"images_seen": state.images_seen, "steps": state.step} | measured)


def train_classifier(run: Run, recipe: ClassifierRecipe, stored: StoredExamples) -> Artifact | None:
    """Train a classifier, measure it on all validation examples, and publish it. Every rank calls it.

    Returns None if `stop_requested` ended the run early: a checkpoint is saved, and the same call resumes.
    """
    data = read_data(run, recipe, stored)
    classifier = initialize(run, stored.tokenizer, lambda: build_classifier(recipe.classifier, data.space))
    parameters, num_classes = count_parameters(classifier), classifier.num_classes
    description = introduce(run, classifier, "tokens", len(data.train), counted(num_classes, "classes"))
    state, _ = train_on_examples(
        run,
        classifier,
        data,
        recipe,
        description=description,
        measure=loss_and_accuracy,
    )
    if state.step < recipe.train.steps:
        return None
    average: Any = state.weight_ema.network
    measured = {} if data.validation is None else loss_and_accuracy(average, data.validation, **measuring(run, recipe))
    measured.pop("total", None)
    weights = state.published()
    if distributed.is_main():
        table = {"classifier": to_table(classifier.config), "space": to_table(classifier.space)}
        write_weights(run.draft, weights)
        run.draft.write_json("config.json", {**table, "image_size": stored.artifact.facts["image_size"]})
        run.draft.write_json("metrics.json", classifier_metrics(data, measured, num_classes))
        run.draft.record_existing("metrics.jsonl")
    facts = {"kind": classifier.config.kind, "num_parameters": parameters, "num_classes": num_classes} | measured
    return run.draft.publish(facts | {"images_seen": state.images_seen, "steps": state.step})


def classifier_metrics(data: ExampleData, measured: Mapping[str, float], num_classes: int) -> dict[str, Any]:
    """Return the content of metrics.json: accuracies of the weight average on all validation examples.

    `chance` is the accuracy of a guess among the classes that occur, which may be a few of `num_classes`.
    """
    missing = {}
    if data.validation is None:
        missing = dict.fromkeys(("top1", "top5"), NOTHING_HELD_OUT)
    elif "top5" not in measured:
        missing = {"top5": f"there are {num_classes} classes"}
    return {
        "recipe": RECIPE,
        "num_classes": num_classes,
        "num_classes_seen": len(data.classes),
        "chance": 1 / len(data.classes),
        "num_images": 0 if data.validation is None else len(data.validation),
        "not_computed": missing,
        **measured,
    }


def measuring(run: Run, recipe: ExamplesRecipe) -> dict[str, Any]:
    """Return the options of `validation_losses` and `loss_and_accuracy`. Batches are as large as those of training."""
    size = recipe.train.share(distributed.world_size()) // recipe.train.accumulate
    return {"batch_size": size, "device": run.device, "precision": recipe.train.precision}


def introduce(run: Run, network: Generator | Classifier, examples: str, num_images: int, *sizes: str) -> str:
    """Print the sizes and the loss of a network; returns its description for the page of the run."""
    kind, parameters, loss = network.config.kind, count_parameters(network), network.loss_in_words
    words = (counted(parameters, "parameters"), counted(num_images, "images"), *sizes)
    run.progress.message(f"{kind}: {', '.join(words)}; loss: {loss}")
    words = (f"{kind} on {examples}", f"{parameters / 1e6:,.1f} M parameters", *sizes)
    return f"{', '.join(words)}; loss: {loss}."


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
