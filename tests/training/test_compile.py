"""torch.compile on the CPU: each network of a step is one graph without breaks, compiled once for 20 steps.

The backend is aot_eager, which traces the forward and the backward pass as Inductor does and leaves out its compiler,
which takes minutes; a test of `test_loop.py` has that of a tokenizer's networks.
"""

from functools import partial
from typing import Any

import pytest
import torch

from vqpipe.config import from_table
from vqpipe.data.batches import Batch
from vqpipe.data.examples import ExampleBatch
from vqpipe.generation import (
    DitConfig,
    GeneratorConfig,
    GptConfig,
    LdmConfig,
    LlamaGenConfig,
    SitConfig,
    Space,
    build_generator,
)
from vqpipe.generation.classifier import ClassifierConfig, LinearProbeConfig, VitConfig, build_classifier
from vqpipe.losses import Objective, ObjectiveConfig
from vqpipe.losses.perceptual import Perceptual
from vqpipe.models import AutoencoderConfig, DiscriminatorConfig, PatchDiscriminator, build_autoencoder
from vqpipe.quantizers import TokenLayout
from vqpipe.training.config import TokenizerTrainConfig, TrainConfig
from vqpipe.training.examples_task import ExamplesTask
from vqpipe.training.networks import compiled_graphs
from vqpipe.training.task import Task
from vqpipe.training.tokenizer_task import TokenizerTask
from vqpipe.weights import Frozen, build_lpips

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
CPU, STEPS, FIRST = torch.device("cpu"), 20, 2
BACKBONES: dict[str, dict[str, Any]] = {
    "vqgan": {"kind": "vqgan", "base_channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1}
    | {"attention_resolutions": [128], "z_channels": 8},
    "dcae": {"kind": "dcae", "widths": [16, 32], "encoder_depths": [0, 1], "decoder_depths": [0, 1]}
    | {"attention_from": 1, "latent_channels": 8},
    "magvit": {"kind": "magvit", "base_channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1},
    "vitamin": {"kind": "vitamin", "widths": [16, 24], "encoder_depths": [1, 1], "decoder_depths": [1, 1]}
    | {"transformer_width": 128, "transformer_depth": 1, "mlp_width": 96},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "l2, hinge, lecam": {"l2": 1.0, "adversarial": 0.1, "lecam": 0.1},
    "log_l2, non_saturating, r1": {"log_l2": 1.0, "adversarial": 0.1, "gan_loss": "non_saturating"}
    | {"adaptive_weight": False, "r1": 1.0, "r1_every": 4},
    "charbonnier, lpips, non_saturating_hinge": {"charbonnier": 1.0, "lpips": 1.0, "perceptual": "squeeze"}
    | {"adversarial": 0.1, "gan_loss": "non_saturating_hinge"},
    "l1 alone": {"l1": 1.0},
}
SMALL: dict[str, Any] = {"layers": 10, "heads": 2, "width": 16}
"""More blocks than Dynamo compiles of one function: they share a graph."""
GENERATORS: dict[str, GeneratorConfig] = {
    "gpt": GptConfig(**SMALL, dropout=0.1, keep=0.8),
    "llamagen": LlamaGenConfig(**SMALL, dropout=0.1),
    "dit": DitConfig(size="tiny"),
    "sit": SitConfig(size="tiny"),
    "ldm": LdmConfig(base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, class_channels=16),
}
CLASSIFIERS: dict[str, ClassifierConfig] = {
    "vit": VitConfig(width=16, depth=2, num_heads=2, drop_path=0.1),
    "linear": LinearProbeConfig(),
}


@pytest.fixture(autouse=True)
def _traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph break is an error, and Inductor's compiler does not run."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", whole_graph)


compile_with = torch.compile


def whole_graph(*args: Any, **settings: Any) -> Any:
    return compile_with(*args, **{**settings, "backend": "aot_eager", "fullgraph": True})


def take_steps(task: Task[Any, Any], batch: Any) -> None:
    """Twenty finite steps, of which the first two may compile."""
    before = compiled_graphs()
    torch._dynamo.utils.counters["graph_break"].clear()
    for number in range(STEPS):
        if number == FIRST:
            graphs = compiled_graphs()
        with torch._dynamo.config.patch(error_on_recompile=number >= FIRST):
            output = task.step(batch, number)
        assert output.values["loss/total"].isfinite()
    assert before < graphs == compiled_graphs()
    assert not torch._dynamo.utils.counters["graph_break"]


def tokenizer_task(backbone: str, **objective: Any) -> TokenizerTask:
    torch.manual_seed(0)
    quantizer = {"kind": "vq", "codebook_size": 32, "code_dim": 8}
    model = build_autoencoder(from_table(AutoencoderConfig, {**BACKBONES[backbone], "quantizer": quantizer}))
    config = ObjectiveConfig(**{"perceptual": "none", "commitment": 0.1, "codebook": 0.1} | objective)
    perceptual = None
    if config.perceptual != "none":
        perceptual = Perceptual(config.perceptual, network=Frozen(build_lpips(config.perceptual)))
    discriminator = PatchDiscriminator(DiscriminatorConfig(base_channels=4))
    task = TokenizerTask(model, discriminator, Objective(config, model.quantizer.loss_names, perceptual=perceptual))
    task.prepare(TokenizerTrainConfig(compile=True, global_batch_size=2), CPU, model)
    task.connect()
    return task


def images() -> Batch:
    torch.manual_seed(0)
    return Batch(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 0]), ["", ""], [0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_networks_of_a_tokenizer_are_compiled_once(backbone: str) -> None:
    take_steps(tokenizer_task(backbone, l1=1.0, adversarial=0.1), images())


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_compiles_nothing_again(name: str) -> None:
    take_steps(tokenizer_task("vqgan", **OBJECTIVES[name]), images())


@pytest.mark.slow
@pytest.mark.parametrize("gan_loss", ["hinge", "non_saturating", "non_saturating_hinge"])
def test_losses_are_graphs_without_breaks(gan_loss: Any) -> None:
    """Without the adaptive weight and R1, which call autograd: training does not compile the losses."""
    config = ObjectiveConfig(
        l1=1.0, l2=1.0, log_l2=1.0, charbonnier=1.0, perceptual="none", commitment=0.1, adversarial=0.1,
        gan_loss=gan_loss, adaptive_weight=False, lecam=0.1,
    )  # fmt: skip
    objective = Objective(config, ["commitment"])
    torch.manual_seed(0)
    pictures, again = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8, requires_grad=True)
    real, fake = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4, requires_grad=True)
    generator = partial(objective.autoencoder_loss, last_layer=again, step=3)
    critic = partial(objective.discriminator_loss, step=3, images=pictures, discriminator=torch.nn.Identity())
    for loss, inputs in (
        (lambda: generator(pictures, again, {"commitment": again.square().mean()}, fake_logits=fake), (again, fake)),
        (lambda: critic(real, fake), (fake,)),
    ):
        expected, found = loss()[0], torch.compile(loss)()[0]
        torch.testing.assert_close(found, expected)
        gradients = (torch.autograd.grad(total, inputs) for total in (found, expected))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "name",
    ["dit", *(pytest.param(name, marks=pytest.mark.slow) for name in (*GENERATORS, *CLASSIFIERS) if name != "dit")],
)
def test_blocks_of_a_generator_or_classifier_are_compiled_once(name: str) -> None:
    torch.manual_seed(0)
    layout = TokenLayout(((4, 4),))
    space = Space(layout=layout, codebook_size=13, latent_dim=4, code_dim=4, num_classes=5)
    classifies = name in CLASSIFIERS
    network: Any = (
        build_classifier(CLASSIFIERS[name], space) if classifies else build_generator(GENERATORS[name], space)
    )
    if network.needs_codebook:
        network.load_codebook(torch.randn(space.codebook_size, space.code_dim))
    ids = torch.randint(space.codebook_size, (2, space.num_tokens))
    on_latents = getattr(network, "trained_on", "tokens") == "latents"
    task = ExamplesTask(network)
    task.prepare(TrainConfig(compile=True, global_batch_size=2), CPU, network)
    task.connect()
    examples = torch.randn(2, space.latent_dim, 4, 4) if on_latents else ids
    take_steps(task, ExampleBatch(examples, torch.tensor([0, 3]), ["a", "b"]))
