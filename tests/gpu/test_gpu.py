"""What only a GPU can show; `make gpu` runs it. With DRY=1 the same tests run on the CPU, at small sizes."""

import copy
import gc
import os
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.recipe import load_classifier, load_generator, load_tokenizer
from vqpipe import presets
from vqpipe.benchmarks.search import reference_ids
from vqpipe.data.batches import Batch
from vqpipe.data.examples import ExampleBatch
from vqpipe.generation import Space, build_generator
from vqpipe.generation.classifier import build_classifier
from vqpipe.losses import Objective
from vqpipe.losses.perceptual import Perceptual
from vqpipe.models import PatchDiscriminator, build_autoencoder
from vqpipe.planning.steps import without_masking
from vqpipe.quantizers import build_quantizer
from vqpipe.search import nearest
from vqpipe.tokenizer import Tokenizer
from vqpipe.training.examples_task import ExamplesTask
from vqpipe.training.loop import train
from vqpipe.training.networks import compiled_graphs
from vqpipe.training.tokenizer_run import TokenizerRecipe
from vqpipe.training.tokenizer_task import TokenizerTask
from vqpipe.weights import Frozen, build_lpips

pytestmark = pytest.mark.gpu
DRY = bool(os.environ.get("DRY"))
SHAPES = (
    (4096, 100_000, 8),
    (2048, 100_000, 8),
    (65_536, 8192, 8),
    (65_536, 100_000, 8),
    (4096, 100_000, 32),
    (65_536, 100_000, 256),
    (16_384, 100_000, 768),
    (1000, 777, 768),
)
"""(N, K, D): the latents and codebooks of the papers, vectors of features in k-means, and one with tails."""
GROUPS = (8, 65_536, 16_384, 8)
"""(G, N, K, D) of a batch of MGVQ."""
CHECKED = 1024


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    if DRY:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    """Give the memory of a test back, for the next one."""
    yield
    if not DRY:
        gc.collect()
        torch.cuda.empty_cache()


def small(*sizes: int) -> tuple[int, ...]:
    return tuple(min(size, 300) for size in sizes) if DRY else sizes


def as_near(vectors: Tensor, codes: Tensor, ids: Tensor) -> bool:
    """Whether each chosen code is as near as the nearest in float64, up to the rounding of float32."""
    wide, table = vectors[:CHECKED].double(), codes.double()
    best = reference_ids(vectors[:CHECKED], codes).to(ids.device)
    chosen, least = ((wide - table[each]).square().sum(dim=1) for each in (ids[:CHECKED], best))
    return bool((chosen - least <= 2**-20 * (wide.square().sum(dim=1) + least)).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_search_finds_the_nearest_code(gpu: torch.device, shape: tuple[int, ...]) -> None:
    count, k, dim = small(*shape)
    torch.manual_seed(0)
    vectors, codes = torch.randn(count, dim).to(gpu), torch.randn(k, dim).to(gpu)
    assert as_near(vectors, codes, nearest(vectors, codes))


def test_groups_are_searched_in_their_own_codes(gpu: torch.device) -> None:
    groups, count, k, dim = small(*GROUPS)
    torch.manual_seed(0)
    vectors, codes = torch.randn(groups, count, dim).to(gpu), torch.randn(groups, k, dim).to(gpu)
    for each in zip(vectors, codes, nearest(vectors, codes), strict=True):
        assert as_near(*each)


@pytest.mark.parametrize("shape", [(1, 1, 1), (129, 127, 3), (1000, 131, 65)])
def test_of_equal_codes_the_first_wins_also_in_tails(gpu: torch.device, shape: tuple[int, ...]) -> None:
    count, k, dim = shape
    torch.manual_seed(1)
    vectors, codes = torch.randn(2, count, dim), torch.randn(2, k, dim)
    twice = torch.cat([codes, codes], dim=1)  # every code twice: the lower id wins
    ids = nearest(vectors.to(gpu), twice.to(gpu)).cpu()
    assert int(ids.max()) < k
    for group in range(2):
        assert as_near(vectors[group], codes[group], ids[group])


@cache
def lpips(kind: Any, device: torch.device) -> torch.nn.Module:
    """LPIPS with random weights."""
    return Frozen(build_lpips(kind)).to(device)


def recipe_of(preset: str, *settings: str) -> TokenizerRecipe:
    return load_tokenizer(preset, ["train.precision=fp32", "train.global_batch_size=2", *settings])


def make_task(recipe: TokenizerRecipe, device: torch.device, state: Any = None) -> TokenizerTask:
    """The networks of a preset with random weights, or with those of `state`; random LPIPS where it is used."""
    torch.manual_seed(0)
    model, discriminator = build_autoencoder(without_masking(recipe.model)), PatchDiscriminator(recipe.discriminator)
    for quantizer in model.quantizer.modules():  # also the groups of one
        if isinstance(codes := getattr(quantizer, "codes", None), Tensor) and codes.flatten()[0].isnan():
            quantizer.load_codebook(torch.randn_like(codes))
    if state is not None:
        model.load_state_dict(state)
    perceptual = None
    if recipe.objective.perceptual != "none":
        perceptual = Perceptual(recipe.objective.perceptual, network=lpips(recipe.objective.perceptual, device))
    objective = Objective(recipe.objective, model.quantizer.loss_names, perceptual=perceptual)
    task = TokenizerTask(model.to(device), discriminator.to(device), objective.to(device))
    task.prepare(recipe.train, device, model)
    task.connect()
    return task


def batch_of(recipe: TokenizerRecipe, count: int = 2) -> Batch:
    side = recipe.data.image_size
    images = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0))
    return Batch(images.to(torch.uint8), torch.full((count,), -1), [""] * count, list(range(count)))


def losses(task: TokenizerTask, recipe: TokenizerRecipe, steps: int) -> list[float]:
    start = recipe.objective.disc_start
    outputs = [task.step(batch_of(recipe), start + number) for number in range(steps)]
    return [float(output.values["loss/total"]) for output in outputs]


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """Without TF32, which a CPU does not have."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("preset", ["smoke", "small"])
def test_steps_are_those_of_the_cpu(gpu: torch.device, preset: str) -> None:
    recipe = recipe_of(preset)
    tasks = [make_task(recipe, device) for device in (torch.device("cpu"), gpu)]
    on_cpu, on_gpu = (losses(task, recipe, 3) for task in tasks)
    assert on_gpu == pytest.approx(on_cpu, rel=2e-3)


def test_steps_in_bf16_are_close_to_float32(gpu: torch.device) -> None:
    wide, narrow = (recipe_of("smoke"), recipe_of("smoke", "train.precision=bf16"))
    assert losses(make_task(narrow, gpu), narrow, 3) == pytest.approx(losses(make_task(wide, gpu), wide, 3), rel=0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_networks_are_whole_graphs_that_are_not_compiled_again(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    if DRY:  # Inductor takes minutes on a CPU
        compiled = partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", compiled)
    recipe = recipe_of("smoke", "train.compile=true", "objective.disc_start=0")
    task = make_task(recipe, gpu)
    losses(task, recipe, 2)
    graphs = compiled_graphs()  # fullgraph=True: a graph break is an error
    assert torch.tensor(losses(task, recipe, 2 if DRY else 18)).isfinite().all()
    assert compiled_graphs() == graphs


class Stream:
    """The same images in every step."""

    def __init__(self, recipe: TokenizerRecipe) -> None:
        self.batch = batch_of(recipe)

    def from_sample(self, images_seen: int) -> Iterator[Batch]:
        while True:
            yield self.batch


@pytest.mark.usefixtures("exact_convolutions")
def test_a_resumed_run_continues(gpu: torch.device, tmp_path: Path) -> None:
    recipe = recipe_of("smoke", "train.warmup_steps=0", "train.save_every=2", "objective.disc_start=0", "train.steps=4")

    def run(folder: str, steps: int) -> dict[str, Tensor]:
        """Train until step `steps`, and return the weights."""
        done = 0

        def stop() -> bool:
            nonlocal done
            done += 1
            return done == steps

        task = make_task(recipe, gpu)
        train(task, recipe.train, Stream(recipe), tmp_path / folder, seed=0, device=gpu, stop_requested=stop)
        return task.model.state_dict()

    weights = run("whole", 4), (run("parts", 2), run("parts", 4))[1]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("exact_convolutions")
def test_ids_are_those_of_the_cpu(gpu: torch.device) -> None:
    recipe = recipe_of("smoke")
    model = make_task(recipe, torch.device("cpu")).model.eval()
    images = batch_of(recipe, 8).images
    on_cpu = Tokenizer(copy.deepcopy(model), image_size=64, device="cpu").encode(images)
    on_gpu = Tokenizer(model, image_size=64, device=gpu).encode(images.to(gpu)).cpu()
    assert float((on_cpu == on_gpu).double().mean()) > 0.999  # but for ties within the rounding of the encoder


def test_gradients_of_one_rank_pass_through_ddp(gpu: torch.device, tmp_path: Path) -> None:
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    backend = "gloo" if gpu.type == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        recipe = recipe_of("smoke")
        alone, task = make_task(recipe, gpu), make_task(recipe, gpu)
        task.ddp_model = DistributedDataParallel(task.model, device_ids=None if DRY else [0])
        assert losses(task, recipe, 2) == pytest.approx(losses(alone, recipe, 2), rel=1e-3)
    finally:
        dist.destroy_process_group()


def steps_at_batch_1(step: Any, gpu: torch.device) -> None:
    """Two finite steps; skips where memory does not allow them."""
    try:
        for number in range(2):
            assert bool(torch.isfinite(step(number)))
    except torch.OutOfMemoryError:
        pytest.skip(f"needs more than the {torch.cuda.get_device_properties(gpu).total_memory / 1e9:.0f} GB of the GPU")


@pytest.mark.parametrize("preset", ["smoke", "small"] if DRY else presets.names("model"))
def test_every_tokenizer_preset_takes_two_steps(gpu: torch.device, preset: str) -> None:
    settings = ["train.global_batch_size=1", "train.accumulate=1", *(["train.precision=fp32"] if DRY else [])]
    recipe = load_tokenizer(preset, settings)

    def step(number: int) -> Tensor:
        output = task.step(batch_of(recipe, 1), recipe.objective.disc_start + number)
        task.after_step(output)
        return output.values["loss/total"]

    task = make_task(recipe, gpu)
    steps_at_batch_1(step, gpu)


@pytest.mark.parametrize(
    "preset",
    ["gpt-tiny", "llamagen-tiny", "dit-tiny", "sit-tiny", "vit-tiny", "linear-probe"]
    if DRY
    else [*presets.names("generator"), *presets.names("classifier")],
)
def test_every_generator_and_classifier_preset_takes_two_steps(gpu: torch.device, preset: str) -> None:
    settings = ["train.global_batch_size=1", "train.accumulate=1", *(["train.precision=fp32"] if DRY else [])]
    classifies = preset in presets.names("classifier")
    recipe = load_classifier(preset, settings) if classifies else load_generator(preset, settings)
    quantizer, side = build_quantizer(load_tokenizer("vqgan-lc-f16-100k").model.quantizer), 4 if DRY else 16
    space = Space.of(quantizer, side, side, 10 if classifies or recipe.examples.conditional else None)

    def step(number: int) -> Tensor:
        return task.step(ExampleBatch(examples, torch.zeros(1, dtype=torch.int64), ["a"]), number).values["loss/total"]

    with gpu:  # the largest have more than 10^9 weights, which a CPU takes long to initialize
        network: Any = (
            build_classifier(recipe.classifier, space) if classifies else build_generator(recipe.generator, space)
        )
    network.to(gpu)
    if network.needs_codebook:
        network.load_codebook(torch.randn(space.codebook_size, space.code_dim, device=gpu))
    if getattr(network, "trained_on", "tokens") == "tokens":
        examples = torch.randint(space.codebook_size, (1, space.num_tokens))
    else:
        examples = torch.randn(1, space.latent_dim, side, side)
    task = ExamplesTask(network)
    task.prepare(recipe.train, gpu, network)
    task.connect()
    steps_at_batch_1(step, gpu)
