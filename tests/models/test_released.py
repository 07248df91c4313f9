"""Conversion of released weights, on small networks of ours written in the layout of every family.

The layouts are written independently of the library, as tables of names.
"""

import argparse
import os
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vqpipe.errors import ConfigError, NumericError, VqpipeError, WeightsError
from vqpipe.models import DcaeConfig, DiscriminatorConfig, PatchDiscriminator, VqganConfig, build_autoencoder
from vqpipe.models.autoencoder import AutoencoderConfig
from vqpipe.models.magvit import MagvitConfig
from vqpipe.models.released import FAMILIES, read_released
from vqpipe.models.vitamin import VitaminConfig
from vqpipe.quantizers import (
    CvqConfig,
    EmaConfig,
    IbqConfig,
    LcConfig,
    LfqConfig,
    MultiGroupConfig,
    MultiScaleConfig,
    QuantizerConfig,
    SimVqConfig,
    VqConfig,
)

Tensors = dict[str, Tensor]
Write = Callable[..., Path]

NARROW: dict[str, Any] = {
    "base_channels": 8,
    "channel_multipliers": (1, 2, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (64,),
    "z_channels": 6,
}
LPIPS = ("scaling_layer.shift", "net.slice1.0.weight", "lin0.model.1.weight")


def vqgan(quantizer: QuantizerConfig, **sizes: Any) -> VqganConfig:
    return VqganConfig(quantizer=quantizer, **{**NARROW, **sizes})


def mgvq(num_groups: int, widths: tuple[int, ...], *depths: tuple[int, ...], attention_from: int) -> DcaeConfig:
    group = CvqConfig(codebook_size=6, code_dim=16 // num_groups, normalize=True)
    return DcaeConfig(
        quantizer=MultiGroupConfig(num_groups=num_groups, group=group, masking="off"),
        widths=widths,
        encoder_depths=depths[0],
        decoder_depths=depths[1],
        attention_from=attention_from,
        latent_channels=16,
    )


def magvit(quantizer: QuantizerConfig, **settings: Any) -> MagvitConfig:
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 2}
    return MagvitConfig(quantizer=quantizer, **{**sizes, **settings})


def bit_groups(num_groups: int) -> MultiGroupConfig:
    return MultiGroupConfig(num_groups=num_groups, group=LfqConfig(code_dim=8), masking="off")


def gsq(num_groups: int, channel_multipliers: tuple[int, ...]) -> MagvitConfig:
    codes = VqConfig(codebook_size=9, code_dim=2, metric="cosine")
    groups = MultiGroupConfig(num_groups=num_groups, group=codes, masking="off")
    return magvit(
        codes if num_groups == 1 else groups,
        channel_multipliers=channel_multipliers,
        norm_eps=1e-5,
        conv_bias=True,
        extra_blocks=True,
    )


UNIT_CODES = VqConfig(codebook_size=9, code_dim=8, normalize=True)


def vitamin(quantizer: QuantizerConfig) -> VitaminConfig:
    sizes = {"widths": (4, 6), "encoder_depths": (1, 2), "decoder_depths": (2, 1)}
    return VitaminConfig(quantizer=quantizer, **sizes, transformer_width=64, transformer_depth=2, mlp_width=10)


CONFIGS: dict[str, AutoencoderConfig] = {
    "vqgan-lc": vqgan(LcConfig(codebook_size=9, code_dim=4, feature_dim=10)),
    "vqgan-lc mlp": vqgan(LcConfig(codebook_size=9, code_dim=4, feature_dim=10, projector="mlp")),
    "vqgan-lc 768": vqgan(LcConfig(codebook_size=9, code_dim=768, projector="none", normalize_latent=True)),
    "vqgan-lc fc f8": vqgan(
        VqConfig(codebook_size=9, code_dim=4),
        channel_multipliers=(1, 1, 2, 3),
        attention_resolutions=(),
        num_res_blocks=2,
    ),
    "vqgan-lc ema": vqgan(EmaConfig(codebook_size=9, code_dim=4, released_start=True)),
    "mgvq": mgvq(4, (4, 8, 32, 32), (0, 2, 1, 1), (0, 1, 2, 1), attention_from=2),
    "mgvq no attention": mgvq(8, (4, 8, 32, 32), (0, 2, 1, 1), (0, 1, 2, 1), attention_from=4),
    "mgvq f2": mgvq(2, (16, 32), (0, 1), (0, 3), attention_from=1),
    "llamagen": vqgan(VqConfig(codebook_size=9, code_dim=4, normalize=True)),
    "var": replace(vqgan(MultiScaleConfig(codebook_size=9, code_dim=6, num_phis=4)), quant_conv_kernel=3),
    "taming": vqgan(VqConfig(codebook_size=9, code_dim=5), attention_resolutions=(256, 64)),
    "ibq": vqgan(IbqConfig(codebook_size=9, code_dim=5)),
    "ibq four blocks": vqgan(IbqConfig(codebook_size=9, code_dim=5), num_res_blocks=4),
    "fvq": vqgan(VqConfig(codebook_size=9, code_dim=64)),
    "open-magvit2": magvit(LfqConfig(code_dim=6)),
    "wetok": magvit(bit_groups(4)),
    "bitdance": magvit(bit_groups(16)),
    "simvq": magvit(SimVqConfig(codebook_size=9, code_dim=5), adaptive_norm=False),
    "simvq batch norm": magvit(SimVqConfig(codebook_size=9, code_dim=5), adaptive_norm=False, norm="batch"),
    "gsq": gsq(3, (2, 1, 2)),
    "gsq one group": gsq(1, (1, 1, 2, 4)),
    "gsq one level": gsq(2, (1,)),
    "unitok": vitamin(MultiGroupConfig(num_groups=2, group=UNIT_CODES, masking="off")),
    "unitok one group": vitamin(UNIT_CODES),
}
"""Family and variant -> our config."""
RELEASED_NAMES: dict[str, dict[str, str]] = {
    "vqgan-lc": {
        "quantizer.codes": "tok_embeddings.weight",
        "quantizer.projector.0": "codebook_projection",
        "quantizer.counts": "cluster_size",
        "quantizer.sums": "embed_avg",
    },
    "vqgan-lc mlp": {"quantizer.codes": "tok_embeddings.weight", "quantizer.projector": "codebook_projection"},
    "llamagen": {
        "quantizer.codes": "quantize.embedding.weight",
        "mid.block_1": "mid.0",
        "mid.attn_1": "mid.1",
        "mid.block_2": "mid.2",
        ".block.": ".res.",
        "encoder.down": "encoder.conv_blocks",
        "decoder.up.0": "decoder.conv_blocks.2",
        "decoder.up.1": "decoder.conv_blocks.1",
        "decoder.up.2": "decoder.conv_blocks.0",
    },
    "var": {"quantizer.codes": "quantize.embedding.weight"},
    "simvq": {
        "quantizer.codes": "quantize.embedding.weight",
        "quantizer.projector.0": "quantize.embedding_proj",
    },
    "taming": {"quantizer.codes": "quantize.embedding.weight"},
    "ibq": {"quantizer.codes": "quantize.embedding.weight"},
}
"""Our names -> names in the files of the family or variant."""
RELEASED_NAMES["fvq"] = RELEASED_NAMES["llamagen"]
DISCRIMINATORS = {
    "vqgan-lc": "discriminator.",
    **dict.fromkeys(("taming", "ibq", "open-magvit2", "wetok", "simvq"), "loss.discriminator."),
}
"""Families with the discriminator among the weights -> prefix of its names."""


def random_state(network: nn.Module) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + 7
        for name, value in state.items()
    }


def as_var(weights: Tensors) -> Tensors:
    """Our weights in the layout of VAR: one convolution for q, k and v, a module per phi, and code usage."""
    out = {"quantize.ema_vocab_hit_SV": torch.zeros(10, 9)}
    for name, value in weights.items():
        if ".q." in name:
            out[name.replace(".q.", ".qkv.")] = torch.cat([weights[name.replace(".q.", f".{p}.")] for p in "qkv"])
        elif ".k." in name or ".v." in name:
            continue
        elif "phi_" in name:
            kind = {"quantizer.phi_weights": "weight", "quantizer.phi_biases": "bias"}[name]
            out |= {f"quantize.quant_resi.qresi_ls.{number}.{kind}": phi for number, phi in enumerate(value)}
        else:
            out[name] = value
    return out


def as_gsq(weights: Tensors) -> Tensors:
    """Our weights in the layout of GSQ: one numbered list of modules in each network, and one codebook."""
    layers = {"norm1": "net.0", "conv1": "net.2", "norm2": "net.3", "conv2": "net.6", "nin_shortcut": "skip"}
    levels = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.down."))

    def modules(prefix: str) -> list[str]:
        numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix)}
        return [f"{prefix}{number}." for number in sorted(numbers)]

    encoder, decoder = [], modules("decoder.mid_block.")
    for level in range(levels):
        encoder += [*modules(f"encoder.down.{level}.block."), f"encoder.down.{level}.downsample."]
    encoder = encoder[:-1] + modules("encoder.mid_block.")
    for level in reversed(range(levels)):
        decoder += [f"decoder.adaptive.{level}.", *modules(f"decoder.up.{level}.block.")]
        decoder += [f"decoder.up.{level}.upsample.conv1."] * (level > 0)
    renamed = {}
    for network, order in (("encoder", encoder), ("decoder", decoder)):
        last = {"encoder": "fianl_layers", "decoder": "final_layers"}[network]
        for ours, theirs in (("norm_out", f"{last}.0"), ("conv_out", f"{last}.2"), ("conv_in", "conv_in")):
            renamed[f"{network}.{ours}."] = f"{network}.{theirs}."
        for number, ours in enumerate(order):
            resample = "downsample" in ours or "upsample" in ours
            renamed[ours] = f"{network}.blocks.{number}." + "conv." * resample
    out = {"zero": torch.zeros(())}
    for name, value in weights.items():
        if name.endswith(".codes"):
            out["quantizers.codebook.weight"] = value
            continue
        prefix = next(prefix for prefix in renamed if name.startswith(prefix))
        parts = name.removeprefix(prefix).split(".")
        out[renamed[prefix] + ".".join(layers.get(part, part) for part in parts)] = value
    return out


def as_unitok(weights: Tensors) -> Tensors:
    """Our weights in the layout of UniTok: a bias of each part of `qkv` in the projections, and the text encoder."""
    prefixes = {"encoder.project": "quant_proj", "decoder.project": "post_quant_proj"}
    prefixes |= {f"encoder.{part}": f"encoder.patch_embed.backbone.{part}" for part in ("stem", "stages", "pool")}
    out = {"encoder.pos_embed": torch.zeros(1, 1, 64), "text_encoder.ln_final.weight": torch.zeros(3)}
    out |= {"logit_scale": torch.zeros(()), "fc_norm.bias": torch.zeros(64), "projection.bias": torch.zeros(3)}
    for name, value in weights.items():
        if name.endswith(".codes"):
            prefix = f"quantizer.codebooks.{name.split('.')[2] if '.groups.' in name else 0}"
            out |= {f"{prefix}.codebook.weight": value, f"{prefix}.vocab_usage": torch.zeros(9)}
            continue
        for ours, theirs in prefixes.items():
            name = name.replace(ours, theirs)
        if name.endswith("quant_proj.attn.qkv.bias"):
            parts = zip(("q_bias", "zero_k_bias", "v_bias"), value.chunk(3), strict=True)
            out |= {name.replace("qkv.bias", part): bias for part, bias in parts}
        else:
            out[name] = value
    return out


class Case:
    """A small network of ours, and its weights in the layout of its family."""

    def __init__(self, name: str) -> None:
        self.family = name.split()[0]
        self.option = "ibq" if self.family == "ibq" else None  # not distinguishable from taming
        self.config = CONFIGS[name]
        self.released_names = RELEASED_NAMES.get(name, RELEASED_NAMES.get(self.family, {}))
        self.state = random_state(build_autoencoder(self.config))
        if "quantizer.shift" in self.state:
            self.state["quantizer.shift"] = torch.zeros(self.state["quantizer.shift"].shape)
            self.state["quantizer.scale"] = torch.ones(())
        groups = [name for name in self.state if name.endswith(".codes")]
        if self.family == "gsq":
            self.state |= {name: self.state[groups[0]].clone() for name in groups}
        self.discriminator = random_state(PatchDiscriminator(DiscriminatorConfig(base_channels=4, num_layers=3)))
        self.weights = self.published()

    def published(self) -> Tensors:
        if self.family == "gsq":
            return as_gsq(self.state)
        if self.family == "unitok":
            return as_unitok(self.state)
        ours = [name for name in self.state if not re.search(r"\.groups\.|\.shift$|\.scale$", name)]
        weights = {self.released_name(name): self.state[name] for name in ours}
        if self.family == "mgvq":
            codes, frequencies = (
                [value for name, value in self.state.items() if name.endswith(end)]
                for end in (".codes", ".frequencies")
            )
            weights["quantize.embedding.weight"] = torch.cat(codes)
            weights["quantize.embed_prob"] = torch.stack(frequencies)
        if self.family in ("mgvq", "llamagen", "fvq"):
            weights["quantize.codebook_used"] = nn.Parameter(torch.zeros(16))
        if self.family == "var":
            weights = as_var(weights)
        if self.family in ("open-magvit2", "wetok"):
            weights["quantize.mask"] = 2 ** torch.arange(6)
        if prefix := DISCRIMINATORS.get(self.family):
            weights |= {prefix + name: value for name, value in self.discriminator.items()}
            weights |= {prefix.replace("discriminator", "perceptual_loss") + name: torch.zeros(2) for name in LPIPS}
        return weights

    def released_name(self, name: str) -> str:
        for ours, theirs in self.released_names.items():
            name = name.replace(ours, theirs)
        return name

    def averaged(self) -> Tensors:
        """Zeros as the weights, and the weights as moving averages, in the layout of a Lightning module."""
        weights = dict(self.weights)
        frozen = ["quantize.mask"] + ["quantize.embedding.weight"] * (self.family == "simvq")
        for name, value in self.weights.items():
            buffer = "running" in name or "num_batches" in name or name in frozen
            if not name.startswith("loss.perceptual") and not buffer:
                weights["model_ema." + name.replace(".", "")] = value
                if not name.startswith("loss."):
                    weights[name] = torch.zeros_like(value)
        return weights | {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(content: Any, name: str = "released.pth") -> Path:
        path = tmp_path / name
        torch.save(content, path)
        return path

    return write


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", CONFIGS)
def test_config_and_weights_are_restored(write: Write, name: str) -> None:
    case = Case(name)
    released = read_released(write({"state_dict": case.weights}), case.option)
    assert released.family == case.family
    assert released.autoencoder.config == case.config
    assert_same(released.autoencoder.state_dict(), case.state)
    assert not any(tensor.is_meta for tensor in released.autoencoder.state_dict().values())
    if case.family in DISCRIMINATORS:
        assert released.discriminator is not None
        assert released.discriminator.config == DiscriminatorConfig(base_channels=4, num_layers=3)
        assert_same(released.discriminator.state_dict(), case.discriminator)
    else:
        assert released.discriminator is None


CONTAINERS: list[tuple[list[str], Callable[[Tensors], dict[str, Any]]]] = [
    (["module."], lambda weights: {"model": weights, "args": argparse.Namespace(lr=1e-4), "opt_ae": {"step": 3}}),
    (["_orig_mod.", "module._orig_mod.", ""], lambda weights: {"state_dict": weights, "epoch": 3}),
    (["_orig_mod.module."], lambda weights: weights),
]
"""Prefixes of the names, and what a file has beside the weights."""


@pytest.mark.parametrize(
    ("name", "container"),
    [
        pytest.param(name, number, marks=[] if number == place % len(CONTAINERS) else pytest.mark.slow)
        for place, name in enumerate(FAMILIES)
        for number in range(len(CONTAINERS))
    ],
)
def test_any_container_and_prefix(write: Write, name: str, container: int) -> None:
    prefixes, layout = CONTAINERS[container]
    case = Case(name)
    wrapped = {prefixes[i % len(prefixes)] + key: value for i, (key, value) in enumerate(case.weights.items())}
    released = read_released(write(layout(wrapped)), case.option)
    assert_same(released.autoencoder.state_dict(), case.state)


def test_half_precision_safetensors_are_read_as_float32(tmp_path: Path) -> None:
    case = Case("llamagen")
    save_file({name: value.detach().half() for name, value in case.weights.items()}, tmp_path / "vq.safetensors")
    released = read_released(tmp_path / "vq.safetensors")
    assert_same(released.autoencoder.state_dict(), {name: value.half().float() for name, value in case.state.items()})


def test_moving_averages_are_used_if_the_authors_evaluate_them(write: Write) -> None:
    for name in ("open-magvit2", "ibq", "wetok", "simvq", "simvq batch norm"):
        case = Case(name)
        released = read_released(write({"state_dict": case.averaged()}), case.option)
        assert_same(released.autoencoder.state_dict(), case.state)
        assert released.discriminator is not None
        assert_same(released.discriminator.state_dict(), case.discriminator)
        assert any("model_ema" in note for note in released.notes)

    llamagen = Case("llamagen")
    raw = {name: torch.zeros_like(value) for name, value in llamagen.weights.items()}
    state = {"model": raw, "ema": llamagen.weights, "discriminator": llamagen.discriminator, "steps": 7, "args": None}
    released = read_released(write(state))
    assert_same(released.autoencoder.state_dict(), llamagen.state)
    assert released.discriminator is not None
    assert_same(released.discriminator.state_dict(), llamagen.discriminator)
    assert any("'ema'" in note for note in released.notes)
    assert any("model, steps, args" in note for note in released.notes)


@pytest.mark.parametrize("name", CONFIGS)
def test_at_most_one_family_matches_a_file(name: str) -> None:
    case = Case(name)
    detected = "taming" if case.family == "ibq" else case.family  # without averages
    assert [family.name for family in FAMILIES.values() if family.matches(case.weights)] == [detected]


def test_ibq_is_detected_from_its_averages_and_depth(write: Write) -> None:
    case = Case("ibq four blocks")
    weights = case.averaged()
    assert [family.name for family in FAMILIES.values() if family.matches(weights)] == ["ibq"]
    released = read_released(write({"state_dict": weights}))
    assert released.family == "ibq"
    assert_same(released.autoencoder.state_dict(), case.state)


def test_ibq_selects_by_inner_product_and_needs_the_family_option(write: Write) -> None:
    path = write({"state_dict": Case("ibq").weights})
    as_taming = read_released(path)
    assert as_taming.family == "taming"
    assert any("--family ibq" in note for note in as_taming.notes)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = read_released(path, "ibq").autoencoder.eval()
    with torch.no_grad():
        latents = network.latent(images)
        products = latents.flatten(2).transpose(1, 2) @ network.quantizer.codebook().T
        ids, nearest = network.encode(images).ids, as_taming.autoencoder.eval().encode(images).ids
    assert torch.equal(ids, products.argmax(dim=2))
    assert not torch.equal(ids, nearest)


def test_missing_average_is_reported(write: Write) -> None:
    weights = Case("open-magvit2").averaged()
    del weights["model_ema.decoderconv_outbias"]
    with pytest.raises(WeightsError, match=r"lacks model_ema\.decoderconv_outbias"):
        read_released(write({"state_dict": weights}))


def test_other_discriminators_are_ignored_with_a_note(write: Write) -> None:
    case = Case("taming")
    weights = {name: value for name, value in case.weights.items() if "discriminator" not in name}
    weights |= {"loss.discriminator.blocks.0.0.weight": torch.zeros(2, 2, 3, 3)}
    released = read_released(write({"state_dict": weights}))
    assert released.discriminator is None
    assert any("not a patch discriminator" in note for note in released.notes)


def test_separate_codebook(write: Write) -> None:
    case = Case("vqgan-lc")
    codebook = case.weights.pop("tok_embeddings.weight")
    path = write({"model": case.weights})
    assert_same(read_released(path, codebook=codebook).autoencoder.state_dict(), case.state)
    with pytest.raises(WeightsError, match=r"lacks tok_embeddings\.weight\. Pass its codebook with --codebook"):
        read_released(path)
    with pytest.raises(WeightsError, match=r"codebook_projection\.weight has shape \[4, 10\], not \[4, 3\]"):
        read_released(path, codebook=torch.zeros(9, 3))
    with pytest.raises(ConfigError, match="contains a codebook or needs none"):
        read_released(write({"model": Case("vqgan-lc").weights}), codebook=codebook)
    with pytest.raises(ConfigError, match="contains a codebook or needs none"):
        read_released(write({"model": Case("mgvq").weights}), codebook=codebook)


def test_mgvq_without_frequencies_has_equal_frequencies(write: Write) -> None:
    case = Case("mgvq")
    del case.weights["quantize.embed_prob"]
    released = read_released(write({"model": case.weights}))
    state = released.autoencoder.state_dict()
    assert torch.equal(state["quantizer.groups.3.frequencies"], torch.full((6,), 1 / 6))
    assert any("no frequencies of codes" in note for note in released.notes)


def test_weights_that_share_memory_are_copied(write: Write) -> None:
    case = Case("vqgan-lc ema")
    case.weights["embed_avg"] = case.weights["tok_embeddings.weight"]
    state = read_released(write({"model": case.weights})).autoencoder.state_dict()
    state["quantizer.sums"].zero_()
    assert torch.equal(state["quantizer.codes"], case.state["quantizer.codes"])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAMILIES else pytest.mark.slow) for name in CONFIGS]
)
def test_missing_misshapen_and_unexpected_weights_are_errors(write: Write, name: str) -> None:
    case = Case(name)
    optional = ("perceptual_loss.", "codebook_used", "embed_prob", "quantize.mask", "ema_vocab_hit")
    optional += ("pos_embed", "vocab_usage", "text_encoder.", "fc_norm.", "projection.", "logit_scale")
    required = [key for key in case.weights if key != "zero" and not any(part in key for part in optional)]
    for key in (required[0], required[-1]):
        others = {other: value for other, value in case.weights.items() if other != key}
        with pytest.raises(WeightsError, match=re.escape(key)):
            read_released(write({"model": others}))
    key = required[len(required) // 2]
    wrong = {**case.weights, key: torch.zeros(*case.weights[key].shape, 2)}
    with pytest.raises(WeightsError, match=re.escape(key)):
        read_released(write({"model": wrong}))
    extra = {f"surprise.{number}": torch.zeros(1) for number in range(5)}
    with pytest.raises(
        WeightsError, match=r"unexpected weights: surprise\.0, surprise\.1, surprise\.2, \.\.\. \(5 in all\)"
    ):
        read_released(write({"model": {**case.weights, **extra}}))


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("taming", "decoder.conv_out.bias", torch.full((3,), torch.nan), "decoder.conv_out.bias contains NaN"),
        ("taming", "quant_conv.bias", torch.zeros(5, dtype=torch.int64), "quant_conv.bias has dtype int64"),
        ("taming", "quant_conv.bias", torch.zeros(1).expand(5), "not a dense tensor"),
        ("taming", "quant_conv.bias", torch.zeros(5).to_sparse(), "not a dense tensor"),
        ("taming", "module.quant_conv.bias", torch.zeros(5), "the same weight twice"),
        ("taming", "encoder.down.7.block.0.conv1.weight", torch.zeros(1), "lacks encoder.down.3"),
        ("taming", "quantize.embed.weight", torch.zeros(9, 5), "Gumbel-softmax"),
        ("var", "quantize.ema_vocab_hit_SV", torch.zeros(9, 9), "9 scales, not the 10 released"),
        ("var", "quantize.quant_resi.qresi_ls.2.bias", torch.zeros(5), "qresi_ls.*.bias differ in shape"),
        ("var", "encoder.mid.attn_1.qkv.bias", torch.zeros(7), "lacks encoder.mid.attn_1.q.bias"),
        ("var", "encoder.mid.attn_1.qkv.bias", torch.zeros(()), "lacks encoder.mid.attn_1.q.bias"),
        ("var", "quant_conv.weight", torch.zeros(6, 6, 2, 2), "quant_conv.weight has shape [6, 6, 2, 2]"),
        ("taming", "model_ema.decay", torch.zeros(()), "inner products"),
        ("mgvq", "quantize.embedding.weight", torch.zeros(25, 4), "25 codes are not divisible into 4 groups"),
        ("mgvq", "quantize.embed_prob", torch.zeros(1), "quantize.embed_prob has shape"),
    ],
)
def test_error_for_one_wrong_weight_is_one_line(write: Write, name: str, key: str, value: Tensor, message: str) -> None:
    with pytest.raises(VqpipeError) as caught:
        read_released(write({"model": {**Case(name).weights, key: value}}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model": {"vit.weight": torch.zeros(2)}},
            "Known are vqgan-lc, mgvq, llamagen, var, taming, ibq, open-magvit2, wetok, bitdance, simvq, fvq, gsq",
        ),
        ({"model": {"vit\n.weight": torch.zeros(2)}}, r"contains 'vit\n.weight', which matches no known family"),
        ({"epoch": 3, "optimizer": {}}, "is not a state dict and has none under model, state_dict, ema"),
        (torch.zeros(9, 10), "is not a state dict or a training state"),
        ({}, "is not a state dict"),
    ],
)
def test_file_of_no_family_is_rejected(write: Write, content: Any, message: str) -> None:
    with pytest.raises(WeightsError) as caught:
        read_released(write(content))
    assert message in str(caught.value)


def test_explicit_family_must_match(write: Write) -> None:
    path = write({"model": Case("taming").weights})
    assert read_released(path, "taming").family == "taming"
    with pytest.raises(WeightsError, match=r"lacks encoder\.stages\.1\. It is damaged, or of another family"):
        read_released(path, "mgvq")
    with pytest.raises(WeightsError, match=r"lacks tok_embeddings\.weight"):
        read_released(path, "vqgan-lc")
    with pytest.raises(ConfigError, match="Did you mean taming"):
        read_released(path, "taiming")


def test_nan_is_a_numeric_error_except_in_ignored_weights(write: Write) -> None:
    weights = Case("vqgan-lc").weights
    weights["perceptual_loss.scaling_layer.shift"] = torch.tensor(torch.nan)
    read_released(write({"model": weights}))
    weights["tok_embeddings.weight"][3, 4] = torch.inf
    with pytest.raises(NumericError):
        read_released(write({"model": weights}))


class Attack:
    """Creates a folder when unpickled without `weights_only`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.marker),)


def test_no_code_in_a_pickle_is_executed(write: Write, tmp_path: Path) -> None:
    weights, attack = Case("taming").weights, Attack(tmp_path / "ran")
    for content in ({"state_dict": weights, "callbacks": attack}, {"state_dict": {**weights, "a": attack}}):
        with pytest.raises(
            WeightsError, match=r"contains more than tensors \(os\.makedirs\); no code in it was executed"
        ):
            read_released(write(content))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(attack))
    with pytest.raises(WeightsError):
        read_released(tmp_path / "plain.pkl")
    assert not (tmp_path / "ran").exists()


def test_truncated_file_is_rejected(write: Write, tmp_path: Path) -> None:
    content = write({"state_dict": Case("taming").weights}).read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        for name in ("torn.ckpt", "torn.safetensors"):
            (tmp_path / name).write_bytes(content[:size])
            with pytest.raises(WeightsError) as caught:
                read_released(tmp_path / name)
            assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="is not a file"):
        read_released(tmp_path)


def test_lightning_callbacks_in_a_training_state_are_replaced_by_placeholders(write: Write) -> None:
    package = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": package, "__qualname__": "ModelCheckpoint"})
    case, instance, allowed = Case("taming"), callback(), torch.serialization.get_safe_globals()
    instance.best = torch.tensor(0.5)
    with pytest.MonkeyPatch.context() as patch:
        for name in accumulate(package.split("."), "{}.{}".format):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setattr(sys.modules[package], "ModelCheckpoint", callback, raising=False)
        state = {callback: {"best_model_score": torch.tensor(0.5)}, "instance": instance}
        path = write({"state_dict": case.weights, "callbacks": state})
    assert package not in sys.modules
    assert_same(read_released(path).autoencoder.state_dict(), case.state)
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


def test_every_family_has_a_config_here() -> None:
    assert list(FAMILIES)[:7] == ["vqgan-lc", "mgvq", "llamagen", "var", "taming", "ibq", "open-magvit2"]
    assert list(FAMILIES)[7:] == ["wetok", "bitdance", "simvq", "fvq", "gsq", "unitok"]
    assert {name.split()[0] for name in CONFIGS} == set(FAMILIES)
