"""What every generator and every classifier promises. A new one adds its example and gets these tests."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqpipe.config import all_subclasses, from_table, to_table
from vqpipe.errors import ConfigError, DataError, NumericError, WeightsError
from vqpipe.generation import (
    DitConfig,
    Generator,
    GeneratorConfig,
    Gpt,
    GptConfig,
    LdmConfig,
    LlamaGen,
    LlamaGenConfig,
    SamplingConfig,
    SitConfig,
    Space,
    build_generator,
)
from vqpipe.generation.classifier import (
    Classifier,
    ClassifierConfig,
    LinearProbeConfig,
    VitConfig,
    build_classifier,
)
from vqpipe.generation.sampling import (
    append_null_classes,
    guide_logits,
    repeat_for_guidance,
    sample_ids,
    uniform_noise,
)
from vqpipe.quantizers import QuantizerConfig, TokenLayout, build_quantizer

Rngs = Callable[..., list[torch.Generator]]

SMALL: dict[str, Any] = {"layers": 2, "heads": 2, "width": 16, "dropout": 0.5}
TINY_LDM: dict[str, Any] = {
    "base_channels": 32,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "class_channels": 16,
}
EXAMPLES: dict[str, GeneratorConfig] = {
    "gpt": GptConfig(**SMALL),
    "gpt-noise": GptConfig(**SMALL, keep=0.8, label_smoothing=0.1),
    "gpt-codebook": GptConfig(**SMALL, embedding="codebook"),
    "gpt-groups": GptConfig(**SMALL, embedding="codebook"),
    "llamagen": LlamaGenConfig(**SMALL),
    "llamagen-groups": LlamaGenConfig(**SMALL),
    "llamagen-linear": LlamaGenConfig(**SMALL, head="linear"),
    "dit": DitConfig(size="tiny"),
    "dit-ddim": DitConfig(size="tiny", patch_size=1, learn_variance=False, sampler="ddim", eta=0.5),
    "sit": SitConfig(size="tiny"),
    "sit-sde": SitConfig(size="tiny", sampler="sde"),
    "ldm": LdmConfig(**TINY_LDM),
}
GROUPS = {"gpt-groups": 2, "llamagen-groups": 4}
CODEBOOK = {"gpt-codebook", "gpt-groups", "llamagen", "llamagen-groups", "llamagen-linear"}
"""Examples that embed ids by the tokenizer's codebook."""
WITHOUT_GRADIENT = {"ldm": ("attn2.to_q", "attn2.to_k", "norm2")}
"""Weights that cannot matter: attention to one class token is 1, whatever the queries and keys are."""
TOKENS = [name for name, config in EXAMPLES.items() if config.kind in ("gpt", "llamagen")]
LATENTS = [name for name, config in EXAMPLES.items() if config.kind in ("dit", "sit", "ldm")]
KINDS = {config.kind: name for name, config in EXAMPLES.items()}.values()
"""The last example of each kind: that of dit has no variance, which would not be guided."""
K, CLASSES = 13, 5


def space_of(name: str, num_classes: int | None = CLASSES) -> Space:
    groups = GROUPS.get(name, 1)
    layout = TokenLayout(((4, 4),), groups)
    return Space(layout=layout, codebook_size=K, latent_dim=4 * groups, code_dim=4, num_classes=num_classes)


def codebook_of(space: Space) -> Tensor:
    return torch.randn(space.num_groups, K, 4, generator=torch.Generator().manual_seed(1))


def make(name: str, num_classes: int | None = CLASSES, **changes: Any) -> Generator:
    """A generator with random weights: at initialization, some networks ignore their input."""
    torch.manual_seed(0)
    config = from_table(GeneratorConfig, {**to_table(EXAMPLES[name]), **changes})
    generator = build_generator(config, space_of(name, num_classes))
    for weight in generator.parameters():
        nn.init.normal_(weight, std=0.1 if name in LATENTS else 0.6)
    for module in generator.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=3.0)  # so that samples depend on the class
    if generator.needs_codebook:
        generator.load_codebook(codebook_of(generator.space))
    return generator


def examples_of(generator: Generator, count: int) -> Tensor:
    torch.manual_seed(2)
    if generator.trained_on == "tokens":
        return torch.randint(K, (count, generator.space.num_tokens))
    return torch.randn(count, generator.space.latent_dim, 4, 4)


def distance(one: Tensor, other: Tensor) -> float:
    """Share of different ids, or the largest difference of latents in standard deviations."""
    if one.dtype == torch.int64:
        return float((one != other).float().mean())
    return float((one - other).abs().max() / one.std())


def sampling(**settings: Any) -> SamplingConfig:
    return SamplingConfig(**{"steps": 4, **settings})


@pytest.mark.parametrize(("base", "examples"), [(Generator, EXAMPLES), (Classifier, "classifiers")])
def test_every_class_has_an_example(base: type[Any], examples: Any) -> None:
    configs = CLASSIFIERS if examples == "classifiers" else examples
    concrete = {each.config_class for each in all_subclasses(base) if not inspect.isabstract(each)}
    assert concrete == {type(config) for config in configs.values()}


@pytest.mark.slow
def test_importing_all_generators_loads_no_large_library() -> None:
    code = (
        "import sys; from vqpipe.generation import image_generator; "
        "print(sorted({'diffusers', 'timm', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", EXAMPLES)
def test_config_and_space_round_trip_through_tables(name: str) -> None:
    table = to_table(EXAMPLES[name])
    assert from_table(GeneratorConfig, table) == EXAMPLES[name]
    assert from_table(Space, to_table(space_of(name))) == space_of(name)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ConfigError, match=r"generator\.class_dropout = .* It must be at least 0 and at most 1"):
            from_table(GeneratorConfig, {**table, "class_dropout": wrong})


@pytest.mark.parametrize("name", EXAMPLES)
def test_samples_have_the_shape_type_and_range_of_examples(name: str, rngs: Rngs) -> None:
    generator = make(name)
    samples = generator.sample(torch.tensor([0, 4, 2]), sampling(), rngs(1, 2, 3))
    assert samples.shape == examples_of(generator, 3).shape
    assert samples.dtype == examples_of(generator, 3).dtype
    assert samples.isfinite().all()
    if generator.trained_on == "tokens":
        assert 0 <= int(samples.min()) <= int(samples.max()) < K
        assert len(samples.unique()) > 3


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", TOKENS)
def test_probabilities_that_are_not_finite_are_found_once_after_the_last_id(
    name: str, guidance: float, rngs: Rngs, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, label, waits, is_true = make(name), torch.tensor([2]), list[Tensor](), Tensor.__bool__

    def wait(tensor: Tensor) -> bool:
        waits.append(tensor)
        return is_true(tensor)

    monkeypatch.setattr(Tensor, "__bool__", wait)
    generator.sample(label, sampling(cfg_scale=guidance), rngs(1))
    assert len(waits) <= 2  # of 16 ids or more; the first is about the codebook
    for parameter in generator.parameters():
        nn.init.constant_(parameter, torch.nan)
    with pytest.raises(NumericError, match="the generator predicts NaN or infinity"):
        generator.sample(label, sampling(cfg_scale=guidance), rngs(1))


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_images_are_an_empty_tensor(name: str) -> None:
    generator = make(name)
    samples = generator.sample(torch.empty(0, dtype=torch.int64), sampling(cfg_scale=2.0), [])
    assert (samples.shape, samples.dtype) == (examples_of(generator, 0).shape, examples_of(generator, 0).dtype)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_image_is_a_function_of_its_label_and_rng_in_any_batch(name: str, rngs: Rngs) -> None:
    generator, guided = make(name), sampling(cfg_scale=9.0, cfg_schedule="linear")
    together = generator.sample(torch.tensor([1, 2, 3]), guided, rngs(7, 8, 9))[1:2]
    assert distance(together, generator.sample(torch.tensor([2]), guided, rngs(8))) < 1e-4
    for label, settings, seed in ((3, guided, 8), (2, sampling(), 8), (2, guided, 9)):
        other = generator.sample(torch.tensor([label]), settings, rngs(seed))
        assert distance(together, other) > 1e-3, (label, settings, seed)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_unconditional_generator_ignores_labels(name: str, rngs: Rngs) -> None:
    generator = make(name, num_classes=None)
    examples, labels = examples_of(generator, 2), torch.tensor([-1, -1])
    assert generator(examples, labels)["total"].isfinite()
    assert generator.drop_labels(labels).tolist() == [0, 0]
    samples = generator.sample(labels, sampling(), rngs(1, 2))
    assert distance(samples[0], samples[1]) > 1e-3
    assert torch.equal(samples, generator.sample(torch.tensor([3, 900]), sampling(), rngs(1, 2)))


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(
    ("change", "labels", "cfg_scale", "error", "message"),
    [
        ({}, [0, CLASSES], 1.0, DataError, "label 5 is out of range. This generator has the classes 0 to 4"),
        ({}, [0, -1], 1.0, DataError, "label -1 is negative"),
        ({}, [0], 1.0, DataError, r"labels of shape \[1\] for 2 images"),
        (
            {"class_dropout": 0.0},
            [0, 1],
            2.0,
            ConfigError,
            "cfg_scale = 2 needs a generator trained with class dropout",
        ),
        ({"num_classes": None}, [0, 1], 2.0, ConfigError, "trained with class dropout"),
    ],
)
def test_invalid_sampling_is_refused(
    name: str,
    change: dict[str, Any],
    labels: list[int],
    cfg_scale: float,
    error: type[Exception],
    message: str,
    rngs: Rngs,
) -> None:
    with pytest.raises(error, match=message):
        make(name, **change).sample(torch.tensor(labels), sampling(cfg_scale=cfg_scale), rngs(1, 2))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_loss_is_finite_and_reaches_every_weight(name: str) -> None:
    generator = make(name)
    losses = generator(examples_of(generator, 8), torch.arange(8) % CLASSES)
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    losses["total"].backward()
    unreached = {name for name, weight in generator.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert {
        name for name in unreached if not any(part in name for part in WITHOUT_GRADIENT.get(generator.config.kind, ()))
    } == set()


@pytest.mark.parametrize("name", EXAMPLES)
def test_labels_are_dropped_with_the_probability_of_class_dropout(name: str) -> None:
    labels = torch.arange(3000) % CLASSES
    dropped = make(name, class_dropout=0.25).drop_labels(labels)
    assert float((dropped == CLASSES).float().mean()) == pytest.approx(0.25, abs=0.04)
    assert torch.equal(dropped[dropped != CLASSES], labels[dropped != CLASSES])
    assert make(name, class_dropout=0.0).drop_labels(labels) is labels


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_that_of_the_null_class_where_labels_are_dropped(name: str) -> None:
    for dropout, equal in ((1.0, True), (1e-9, False)):
        generator, losses = make(name, class_dropout=dropout), []
        examples = examples_of(generator, 4)
        for label in (0, 1):
            torch.manual_seed(4)
            losses.append(float(generator(examples, torch.full((4,), label))["total"].detach()))
        assert (losses[0] == losses[1]) == equal


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_guidance_with_scale_0_samples_the_null_class(name: str, rngs: Rngs) -> None:
    generator, label = make(name).eval(), torch.tensor([2])
    null = generator.sample_batch(torch.tensor([CLASSES]), sampling(), rngs(8))
    assert distance(generator.sample(label, sampling(cfg_scale=0.0), rngs(8)), null) < 1e-4
    assert distance(generator.sample(label, sampling(), rngs(8)), null) > 1e-3


@pytest.mark.parametrize("name", TOKENS)
def test_the_loss_in_evaluation_mode_is_that_of_unchanged_ids_and_labels(name: str) -> None:
    changed = {"class_dropout": 0.5, "label_smoothing": 0.1} | ({"keep": 0.5} if "gpt" in name else {})
    plain = {"class_dropout": 1e-9, "label_smoothing": 0.0} | ({"keep": 1.0} if "gpt" in name else {})
    one, other = (make(name, **settings).eval() for settings in (changed, plain))
    examples, labels = examples_of(one, 8), torch.arange(8) % CLASSES
    torch.testing.assert_close(one(examples, labels)["total"], other(examples, labels)["total"])


@pytest.mark.parametrize("name", LATENTS)
def test_no_label_is_dropped_in_evaluation_mode(name: str) -> None:
    labels = torch.arange(50) % CLASSES
    assert torch.equal(make(name, class_dropout=0.5).eval().drop_labels(labels), labels)


@pytest.mark.parametrize("name", EXAMPLES)
def test_sampling_has_no_dropout_and_restores_the_mode(name: str, rngs: Rngs) -> None:
    generator = make(name)
    samples = []
    for training in (True, False):
        generator.train(training)
        samples.append(generator.sample(torch.tensor([1]), sampling(), rngs(1)))
        assert {module.training for module in generator.modules()} == {training}
    assert torch.equal(*samples)


@pytest.mark.parametrize("name", EXAMPLES)
def test_config_and_state_dict_restore_the_generator(name: str, rngs: Rngs) -> None:
    generator = make(name)
    torch.manual_seed(3)
    restored = build_generator(generator.config, from_table(Space, to_table(generator.space)))
    restored.load_state_dict(generator.state_dict())
    assert not restored.needs_codebook
    expected = generator.sample(torch.tensor([3]), sampling(), rngs(1))
    assert torch.equal(restored.sample(torch.tensor([3]), sampling(), rngs(1)), expected)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_missing_or_wrong_codebook_is_refused(name: str, rngs: Rngs) -> None:
    generator = build_generator(EXAMPLES[name], space_of(name))
    codebook = codebook_of(generator.space)
    assert generator.needs_codebook == (name in CODEBOOK)
    if name not in CODEBOOK:
        with pytest.raises(ConfigError, match="uses no codebook"):
            generator.load_codebook(codebook)
        return
    with pytest.raises(WeightsError, match="Call load_codebook first"):
        generator.sample(torch.tensor([0]), sampling(), rngs(1))
    with pytest.raises(ConfigError, match=r"shape \[.*13, 5\] does not fit"):
        generator.load_codebook(torch.zeros(generator.space.num_groups, K, 5))
    generator.load_codebook(codebook)
    assert not generator.needs_codebook


@torch.no_grad()
def sample_without_cache(generator: Any, labels: Tensor, sampling: SamplingConfig, rngs: list[Any]) -> Tensor:
    """The same ids as `sample`, with the whole sequence computed again for every id."""
    groups, count = generator.space.num_groups, generator.space.num_tokens
    uniform = uniform_noise(rngs, count, labels.device)
    classes = append_null_classes(generator.class_ids(labels), generator.null_class, sampling)
    ids = torch.empty(len(classes), 0, dtype=torch.long)
    for number in range(count):
        if isinstance(generator, Gpt):
            logits = guide_logits(generator.logits(generator.hidden(classes, ids)[:, -1]), sampling, number, count)
        else:
            assert isinstance(generator, LlamaGen)
            position, group = divmod(number, groups)
            trunk = generator.trunk(classes, ids[:, : position * groups])[:, -1]
            logits = generator.ar_head.head(generator.ar_head(trunk, ids[:, position * groups :]))[:, group]
            logits = guide_logits(logits, sampling, position, count // groups)
        next_ids = sample_ids(logits, uniform[:, number], sampling)
        ids = torch.cat([ids, repeat_for_guidance(next_ids, sampling).unsqueeze(1)], dim=1)
    return ids[: len(labels)]


@pytest.mark.parametrize(
    ("num_classes", "settings"),
    [
        pytest.param(CLASSES, {"temperature": 0.0}, marks=pytest.mark.slow),
        (None, {"temperature": 0.0}),
        (CLASSES, {"temperature": 1.3, "top_k": 0.7, "top_p": 0.9}),
        pytest.param(None, {"temperature": 1.3, "top_k": 0.7, "top_p": 0.9}, marks=pytest.mark.slow),
        (CLASSES, {"cfg_scale": 3.0, "cfg_schedule": "linear"}),
        pytest.param(CLASSES, {"cfg_scale": 3.0, "cfg_schedule": "cosine"}, marks=pytest.mark.slow),
    ],
    ids=["greedy", "greedy-unconditional", "sampled", "sampled-unconditional", "guided-linear", "guided-cosine"],
)
@pytest.mark.parametrize("name", TOKENS)
def test_cached_sampling_equals_the_whole_sequence(
    name: str, num_classes: int | None, settings: dict[str, Any], rngs: Rngs
) -> None:
    generator, labels = make(name, num_classes).eval(), torch.tensor([0, 4, 1])
    ids = generator.sample(labels, SamplingConfig(**settings), rngs(1, 2, 3))
    assert torch.equal(ids, sample_without_cache(generator, labels, SamplingConfig(**settings), rngs(1, 2, 3)))
    assert settings.get("temperature") == 0 or len(ids.unique()) > 2


@pytest.mark.parametrize("name", LATENTS)
def test_latents_of_another_shape_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"latents of shape \[2, 4, 4, 2\], the generator needs \[4, 4, 4\]"):
        make(name).loss(torch.zeros(2, 4, 4, 2), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("name", EXAMPLES)
def test_blocks_are_modules_of_the_network(name: str) -> None:
    generator = make(name)
    blocks = list(generator.blocks())
    assert len(blocks) >= 2
    assert set(blocks) <= set(generator.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "llamagen-groups"])
def test_a_token_generator_memorises_sixty_four_images(name: str, rngs: Rngs) -> None:
    groups = GROUPS.get(name, 1)
    side = 8 if groups == 1 else 4
    layout = TokenLayout(((side, side),), groups)
    space = Space(layout=layout, codebook_size=256, latent_dim=4 * groups, code_dim=4, num_classes=64)
    torch.manual_seed(0)
    config = GptConfig if name == "gpt" else LlamaGenConfig
    layers = 4 if name == "gpt" else 2
    generator = build_generator(config(layers=layers, heads=4, width=128, dropout=0.0), space)
    if generator.needs_codebook:
        generator.load_codebook(torch.randn(groups, 256, 4))
    ids, labels = torch.randint(256, (64, 64)), torch.arange(64)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=3e-3)
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20, (100 - step) / 30)
        optimizer.zero_grad()
        generator(ids, labels)["total"].backward()
        optimizer.step()
    assert torch.equal(generator.sample(labels, SamplingConfig(temperature=0.0), rngs(*range(64))), ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "repeats", "steps", "samplers"),
    [
        (DitConfig(size="tiny", patch_size=1, class_dropout=0.0), 2, 1000, [("ddpm", 100)]),
        (SitConfig(size="tiny", patch_size=1), 2, 1000, [("heun", 100), ("sde", 100)]),
        (LdmConfig(**TINY_LDM, class_dropout=0.0), 1, 1500, [("ddim", 50)]),
    ],
    ids=["dit", "sit", "ldm"],
)
def test_a_latent_generator_memorises_sixteen_latents(
    config: GeneratorConfig, repeats: int, steps: int, samplers: list[tuple[Any, int]], rngs: Rngs
) -> None:
    layout = TokenLayout(((4, 4),))
    torch.manual_seed(0)
    examples, labels = torch.randn(16, 3, 4, 4), torch.arange(16)
    space = Space(layout=layout, codebook_size=16, latent_dim=3, code_dim=3, num_classes=16)
    generator = build_generator(config, space)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-3)
    errors = []
    for _ in range(steps):
        losses = generator(examples.repeat(repeats, 1, 1, 1), labels.repeat(repeats))
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        errors.append(float(losses.get("noise", losses["total"]).detach()))
    assert sum(errors[-100:]) < 0.2 * sum(errors[:20]) * 5
    for sampler, evaluations in samplers:
        samples = generator.sample(labels, SamplingConfig(steps=evaluations, sampler=sampler), rngs(*range(16)))
        distances = torch.cdist(samples.flatten(1), examples.flatten(1)) / 48**0.5
        assert distances.argmin(dim=1).tolist() == labels.tolist()
        assert distances.diagonal().max() < 0.4  # two different latents are 1.4 apart


CLASSIFIERS: dict[str, ClassifierConfig] = {
    "vit": VitConfig(width=16, depth=2, num_heads=2),
    "vit-table": VitConfig(width=16, depth=2, num_heads=2, embedding="table"),
    "linear": LinearProbeConfig(),
    "linear-pooled": LinearProbeConfig(pool=2),
}


def make_classifier(name: str, space: Space) -> Classifier:
    torch.manual_seed(0)
    classifier = build_classifier(CLASSIFIERS[name], space)
    if classifier.needs_codebook:
        classifier.load_codebook(codebook_of(space))
    return classifier.eval()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_trains_every_weight_and_is_restored_by_config_and_state_dict(
    name: str, groups: int, make_space: Callable[..., Space]
) -> None:
    space = make_space(groups=groups)
    classifier = make_classifier(name, space)
    ids, labels = torch.randint(K, (6, space.num_tokens)), torch.arange(6) % CLASSES
    logits = classifier.logits(ids)
    assert logits.shape == (6, CLASSES)
    torch.testing.assert_close(classifier.logits(ids[2:3]), logits[2:3])
    losses = classifier(ids, labels)
    assert losses["train/top1"] == (logits.argmax(1) == labels).float().mean()
    losses["total"].backward()
    assert [
        name for name, weight in classifier.named_parameters() if weight.grad is None or not weight.grad.any()
    ] == []
    assert set(classifier.blocks()) <= set(classifier.modules())
    config = from_table(ClassifierConfig, to_table(classifier.config))
    assert config == classifier.config
    restored = build_classifier(config, space)
    restored.load_state_dict(classifier.state_dict())
    assert torch.equal(restored.eval().logits(ids), logits)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_refuses_wrong_ids_codebooks_and_missing_classes(
    name: str, make_space: Callable[..., Space]
) -> None:
    classifier = make_classifier(name, make_space())
    with pytest.raises(DataError, match=r"expected \[images, 16\]"):
        classifier.logits(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ConfigError, match="needs classes"):
        build_classifier(CLASSIFIERS[name], make_space(num_classes=None))
    message = "does not fit" if classifier.needs_codebook else "learns its embeddings"
    with pytest.raises(ConfigError, match=message):
        classifier.load_codebook(torch.zeros(3, 4))


@pytest.mark.parametrize(
    "table",
    [
        {"kind": "vq", "codebook_size": 16, "code_dim": 4},
        {"kind": "lfq", "code_dim": 4},
        {"kind": "bsq", "code_dim": 12, "bits_per_id": 4},
        {"kind": "fsq", "levels": [4, 3]},
        {"kind": "multi_group", "num_groups": 2, "group": {"kind": "vq", "codebook_size": 8, "code_dim": 3}},
    ],
)
def test_generators_and_classifiers_take_the_codes_of_every_quantizer(table: dict[str, object]) -> None:
    quantizer = build_quantizer(from_table(QuantizerConfig, table)).eval()
    space = Space.of(quantizer, 2, 2, num_classes=2)
    codes = quantizer.all_codes()
    assert codes.shape == (space.num_groups, space.codebook_size, space.code_dim)
    ids = torch.randint(0, space.codebook_size, (1, space.num_tokens))
    expected = quantizer.lookup(ids, space.layout)[0, :, 1, 0]
    (grid,) = space.layout.split(ids)
    torch.testing.assert_close(torch.cat([codes[g, grid[0, 1, 0, g]] for g in range(space.num_groups)]), expected)
    build_classifier(CLASSIFIERS["vit"], space).load_codebook(codes)
    build_generator(EXAMPLES["llamagen"], space).load_codebook(codes)
