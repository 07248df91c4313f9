"""Evaluations from images to a published report: `metrics.json`, the page, and what it is drawn from."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqpipe import artifacts, distributed
from vqpipe.artifacts import Artifact, Draft
from vqpipe.config import to_request
from vqpipe.continuous import ImageAutoencoder
from vqpipe.data.images import ImageSet, open_images
from vqpipe.evaluation.analysis import Analysis
from vqpipe.evaluation.evaluate import check_size, evaluate
from vqpipe.evaluation.generation import GenerationConfig, GenerationEvaluator, code_usage, origin_of, samples_artifact
from vqpipe.evaluation.random_classes import draw_classes
from vqpipe.metrics.config import EvalConfig
from vqpipe.metrics.feature_networks import FeatureNetworks
from vqpipe.metrics.usage import dead_codes
from vqpipe.progress import SILENT, Progress
from vqpipe.provenance import command_again
from vqpipe.reports import page
from vqpipe.reports.evaluation import MEASURES, NUM_HEADLINES, EvaluationResult, counts_to_array, value_of
from vqpipe.reports.evaluation_page import evaluation_page
from vqpipe.reports.generated import Generated, generated_page
from vqpipe.reports.pictures import contact_sheet

SHEET_COLUMNS = 8


def evaluate_tokenizer(
    out: Path,
    images: ImageSet,
    autoencoder: ImageAutoencoder,
    config: EvalConfig,
    networks: FeatureNetworks,
    *,
    analyses: Sequence[Analysis] = (),
    embedding_codes: int | None = None,
    random_classes: int | None = None,
    limit: int | None = None,
    num_workers: int = -1,
    seed: int = 0,
    progress: Progress = SILENT,
) -> tuple[Artifact, EvaluationResult | None]:
    """Measure an autoencoder on the first `limit` images and publish the report at `out`. Every rank calls it.

    Args:
        embedding_codes: that of the analyses, where it is set.
        random_classes: measure only the images of so many classes, drawn at random; `limit` applies to these.
        seed: that of the analyses and of the random classes.

    Returns:
        The report, and the result of the evaluation; None if the report was published before.

    Raises:
        DataError: images of this size do not fit the autoencoder; and the errors of `evaluate`.
    """
    check_size(autoencoder, config)
    request = to_request(config) | {"limit": limit, "weights": networks.sha256, "extractor": networks.extractor_sha256}
    request |= {"analyze": [each.name for each in analyses]} if analyses else {}
    optional = {"embedding_codes": embedding_codes, "random_classes": random_classes}
    request |= {name: value for name, value in optional.items() if value is not None}
    request |= {"seed": seed} if analyses or random_classes is not None else {}
    chosen, drawn = images, dict[str, Any]()
    if random_classes is not None:
        chosen, drawn["random_classes"] = draw_classes(images, random_classes, seed)
    inputs = {"images": images, "tokenizer": autoencoder.source}
    draft = artifacts.start(out, "report", request, inputs, tolerance="--set eval.max_skipped")
    if isinstance(draft, Artifact):
        return draft, None
    with draft:
        result = evaluate(
            chosen,
            autoencoder,
            config,
            networks,
            analyses=analyses,
            limit=limit,
            num_workers=num_workers,
            draft=draft,
            progress=progress,
        )
        result = replace(result, metrics={**result.metrics, **drawn, **images.facts})
        return publish_evaluation(draft, result), result


def evaluate_samples(
    out: Path,
    images: Sequence[str],
    references: Sequence[str],
    statistics: Path,
    config: GenerationConfig,
    networks: FeatureNetworks,
    device: torch.device,
    *,
    limit: int | None = None,
    progress: Progress = SILENT,
) -> tuple[Artifact, dict[str, Any] | None]:
    """Measure the first `limit` samples against references and publish the report at `out`. Every rank calls it.

    Args:
        images: the samples, as of `open_images`.
        references, statistics: names and target of `GenerationEvaluator.references`.

    Returns:
        The report, and its metrics; None if the report was published before.
    """
    samples = open_images(images)
    for line in samples.remarks:
        progress.message(line)
    evaluator = GenerationEvaluator(config, networks, device, progress)
    measured, source = evaluator.references(references, statistics)
    request = evaluator.request | {
        "limit": limit,
        "fid_min_images": config.fid_min_images,
        "max_skipped": config.max_skipped,
    }
    draft = artifacts.start(out, "report", request, {"images": samples, "reference": source})
    if isinstance(draft, Artifact):
        return draft, None
    with draft:
        num_samples = min(limit or len(samples), len(samples))
        metrics, shown = evaluator.measure(draft, samples, num_samples, measured)
        artifact = samples_artifact(images)
        usage, reasons = distributed.on_main(lambda: code_usage(artifact, num_samples))
        metrics |= {**samples.facts, **usage, **origin_of(artifact), "not_computed": metrics["not_computed"] | reasons}
        return publish_generation(draft, metrics, shown), metrics


def publish_evaluation(draft: Draft, evaluated: EvaluationResult) -> Artifact:
    """Write the report of `evaluate`, and publish it. Every rank calls it."""
    own = command_again()
    earlier = [each for each in evaluated.commands if without_out(each) != without_out(own)]  # both are `vqpipe demo`
    evaluated = replace(evaluated, lineage=lineage(draft), commands=[*earlier, own])
    if distributed.is_main():
        write_evaluation(draft, evaluated)
    metrics = evaluated.metrics
    headline = {measure.key: value_of(metrics, measure.key) for measure in MEASURES[:NUM_HEADLINES]}
    facts = {key: metrics[key] for key in ("protocol", "num_images", "image_size")}
    return draft.publish(facts | {key: value for key, value in headline.items() if value is not None})


def without_out(command: str) -> str:
    """A command line without --out."""
    return re.sub(r" --out[ =](?:'[^']*'|\S)+", "", command)


def write_evaluation(draft: Draft, evaluated: EvaluationResult) -> None:
    """`metrics.json`, `counts.npy`, `dead-codes.npy` unless the codebook is too large to list them, the pictures, the
    log of the tokenizer's training, and the page."""
    draft.write_json("metrics.json", {**evaluated.metrics, "commands": list(evaluated.commands)})
    with draft.write("counts.npy") as path:
        np.save(path, counts_to_array(evaluated.counts))
    if evaluated.is_discrete and not evaluated.counts.is_sparse:
        with draft.write("dead-codes.npy") as path:
            np.save(path, dead_codes(evaluated.counts).numpy())
    for number, shown in enumerate(evaluated.shown):
        for side, png in (("original", shown.original), ("reconstruction", shown.reconstruction)):
            draft.write_bytes(f"pictures/{number:02d}-{side}.png", png)
    if evaluated.history:
        draft.write_text("training.jsonl", "".join(json.dumps(row) + "\n" for row in evaluated.history))
    draft.write_text("report.html", page.render(evaluation_page(evaluated)))


def publish_generation(draft: Draft, metrics: dict[str, Any], samples: Tensor) -> Artifact:
    """Write the report of generated images, with a contact sheet of uint8[n, 3, S, S], and publish it. Every rank
    calls it."""
    if distributed.is_main():
        command, sheet = command_again(), contact_sheet(samples, SHEET_COLUMNS)
        draft.write_json("metrics.json", {**metrics, "commands": [command]})
        draft.write_bytes("contact-sheet.png", sheet)
        generated = Generated(draft.lineage["images"]["name"], metrics, sheet, lineage(draft), [command])
        draft.write_text("report.html", page.render(generated_page([generated], draft.out.name)))
    headline = ("protocol", "num_images", "image_size", "fid", "sfid")
    return draft.publish({name: metrics[name] for name in headline if name in metrics})


def lineage(draft: Draft) -> dict[str, Any]:
    """The lineage of the report, for its page."""
    return {"kind": "report", "name": "(this page)", "content": "", "inputs": draft.lineage}
