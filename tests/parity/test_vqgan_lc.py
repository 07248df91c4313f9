"""Parity with VQGAN-LC's released code, on weights that are a function of their names in the reference.

All sizes are those of the paper, except codebooks of 1000 codes.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from vqpipe.losses import Objective, ObjectiveConfig, Perceptual
from vqpipe.models import Autoencoder, PatchDiscriminator, Vqgan, VqganConfig
from vqpipe.quantizers import EmaConfig, LcConfig, QuantizerConfig, VqConfig, build_quantizer
from vqpipe.quantizers.base import to_rows

OUR_NAMES = {
    "quantizer.codes": "tok_embeddings.weight",
    "quantizer.projector.0.weight": "codebook_projection.weight",
    "quantizer.projector.0.bias": "codebook_projection.bias",
}
VARIANTS: dict[str, QuantizerConfig] = {
    "lc_f16_cb1": LcConfig(codebook_size=1000),
    "fc_f16": VqConfig(codebook_size=1000, code_dim=8),
    "vqgan_f16": VqConfig(codebook_size=1000, code_dim=256),
    "ema_f16": EmaConfig(codebook_size=1000, code_dim=8, released_start=True),
}
Expected = Callable[[str], dict[str, Tensor]]
Autoencoders = Callable[[str], Autoencoder]
Image = Callable[[int], Tensor]
CLOSE = {"rtol": 0, "atol": 2e-5}
LOSS = {"rtol": 1e-5, "atol": 0}


@pytest.fixture(scope="module")
def autoencoder(fill: Callable[..., None], uninitialized: Callable[[], AbstractContextManager[None]]) -> Autoencoders:
    """autoencoder(variant): the model with the weights of the reference, cached."""

    @cache
    def autoencoder(variant: str) -> Autoencoder:
        with uninitialized():
            model = Vqgan(VqganConfig(quantizer=VARIANTS[variant])).eval()
        fill(model, names=OUR_NAMES, embedding_scale=1.0 if variant.endswith("_cb1") else 0.02)
        if variant.startswith("ema"):
            model.quantizer.sums.copy_(model.quantizer.codes)
        return model

    return autoencoder


@pytest.fixture(scope="module")
def discriminator(fill: Callable[..., None]) -> PatchDiscriminator:
    network = PatchDiscriminator().eval()
    fill(network, "discriminator.")
    return network


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory, filled: Callable[..., Tensor]) -> Path:
    """A file of VGG16 filled by names of the reference, with torchvision's tensor names."""
    import torchvision

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in torchvision.models.vgg16().features.named_parameters()}
    slices = [(1, 0), (2, 5), (3, 10), (4, 17), (5, 24)]  # slice of the reference, its first layer
    tensors = {}
    for name, shape in shapes.items():
        number = max(slice_ for slice_, first in slices if int(name.split(".")[0]) >= first)
        tensors[f"features.{name}"] = filled(f"perceptual_loss.net.slice{number}.{name}", shape)
    file = tmp_path_factory.mktemp("weights") / "vgg.safetensors"
    save_file(tensors, file)
    return file


@pytest.fixture(scope="module")
def objective(vgg_file: Path, filled: Callable[..., Tensor]) -> Objective:
    """The published loss weights, with LPIPS and its heads filled by name."""
    weights = {"l1": 1.0, "lpips": 1.0, "commitment": 0.1, "codebook": 0.033, "adversarial": 0.1}
    config = ObjectiveConfig(**weights, perceptual="vgg", lpips_weights=str(vgg_file))
    objective = Objective(config, ("commitment", "codebook"))
    assert isinstance(objective.perceptual, Perceptual)
    with torch.no_grad():
        for name, tensor in objective.perceptual.named_parameters():
            if name.endswith("model.1.weight") and ".lins." not in name:
                tensor.copy_(filled("perceptual_loss." + name.split(".", 2)[2], tensor.shape))
    return objective


def assert_ids(ids: Tensor, want: Tensor, gap: Tensor, smallest_gap: float) -> None:
    """Compare ids where the two nearest codes differ by more than rounding."""
    clear = gap.flatten() > smallest_gap
    assert clear.float().mean() > 0.9
    assert torch.equal(ids.flatten()[clear], want.flatten().long()[clear])


def assert_gradient(gradient: Tensor | None, want: Tensor) -> None:
    """Compare to a relative 2e-3, and an absolute 1e-5 of the largest element."""
    assert gradient is not None
    torch.testing.assert_close(gradient, want, rtol=2e-3, atol=1e-5 * float(want.abs().max()))


def quantizer_loss(losses: dict[str, Tensor]) -> Tensor:
    """The released qloss: commitment + 0.33 codebook; under EMA the commitment only."""
    return losses["commitment"] + 0.33 * losses.get("codebook", torch.zeros(()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_has_the_released_name_shape_and_values(
    parity_outputs: Path, autoencoder: Autoencoders, discriminator: PatchDiscriminator, variant: str
) -> None:
    keys = json.loads((parity_outputs / "vqgan_lc" / "keys.json").read_text())[variant]
    check = json.loads((parity_outputs / "vqgan_lc" / "fill_check.json").read_text())[variant]
    ours = {OUR_NAMES.get(name, name): tensor for name, tensor in autoencoder(variant).state_dict().items()}
    ours |= {f"discriminator.{name}": tensor for name, tensor in discriminator.state_dict().items()}
    released_elsewhere = {"cluster_size": "quantizer.counts", "embed_avg": "quantizer.sums"}
    for name, shape in keys.items():
        if not name.startswith("perceptual_loss."):
            assert list(ours.pop(released_elsewhere.get(name, name)).shape) == shape, name
    assert set(ours) <= {"quantizer.shift", "quantizer.scale"}
    filled_now = {OUR_NAMES.get(name, name): tensor for name, tensor in autoencoder(variant).state_dict().items()}
    filled_now |= {f"discriminator.{name}": tensor for name, tensor in discriminator.state_dict().items()}
    for name, numbers in check.items():
        if not name.startswith("_"):
            torch.testing.assert_close(filled_now[name].double().abs().sum().item(), numbers["abs_sum_f64"])


@pytest.mark.parametrize("size", [64, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_image_to_tokens_and_back(
    expected: Expected, autoencoder: Autoencoders, image: Image, variant: str, size: int
) -> None:
    numbers = expected(f"vqgan_lc/{variant}")
    want = {key[len(f"s{size}_") :]: value for key, value in numbers.items() if f"s{size}_" in key}
    model = autoencoder(variant)
    with torch.no_grad():
        decoded, latent, quantized = model(image(size))
    wide = variant == "vqgan_f16"
    assert_ids(quantized.ids, want["tokens"], want["top2_dist_gap"], 1e-4 if wide else 1e-5)
    torch.testing.assert_close(latent[:, :, ::4, ::4] if wide and size == 256 else latent, want["z"], **CLOSE)
    if "zq" in want:
        torch.testing.assert_close(quantized.codes, want["zq"], **CLOSE)
    if size == 64:
        torch.testing.assert_close(decoded, want["dec"], **CLOSE)
    else:
        torch.testing.assert_close(F.avg_pool2d(decoded, 8), want["dec_avgpool8"], **CLOSE)
    moments = torch.stack([decoded.mean(), decoded.std(unbiased=False), decoded.min(), decoded.max()]).double()
    torch.testing.assert_close(moments, want["dec_mean_std"], rtol=0, atol=2e-5)
    torch.testing.assert_close(quantized.losses["commitment"].double(), want["mse_zq_z"], **LOSS)
    torch.testing.assert_close(quantizer_loss(quantized.losses).double(), want["qloss"], **LOSS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_codes(expected: Expected, autoencoder: Autoencoders, variant: str) -> None:
    want = expected(f"vqgan_lc/{variant}")
    codes = autoencoder(variant).quantizer.codebook().detach()
    if "codes" in want:
        torch.testing.assert_close(codes, want["codes"], **CLOSE)
    else:
        sums = torch.stack([codes.double().sum(), codes.double().abs().sum()])
        torch.testing.assert_close(sums, want["codes_sum_abs"], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[] if name == "lc_f16_cb1" else pytest.mark.slow) for name in VARIANTS],
)
def test_losses_and_gradients_of_one_step(
    parity_outputs: Path,
    expected: Expected,
    autoencoder: Autoencoders,
    discriminator: PatchDiscriminator,
    image: Image,
    objective: Objective,
    variant: str,
) -> None:
    want = {key[4:]: value for key, value in expected(f"vqgan_lc/{variant}").items() if key.startswith("s64_")}
    norms = json.loads((parity_outputs / "vqgan_lc" / "fill_check.json").read_text())[variant]
    model, images = autoencoder(variant), image(64)
    model.zero_grad()

    latent = model.latent(images).detach().requires_grad_()
    quantizer_loss(model.quantizer(latent).losses).backward()
    assert_gradient(latent.grad, want["grad_qloss_wrt_z"])
    if variant.startswith("lc"):
        weight = model.quantizer.projector[0].weight
        assert_gradient(weight.grad, want["grad_qloss_wrt_projection_weight"])
    model.zero_grad()

    decoded, _, quantized = model(images)
    total, terms = objective.autoencoder_loss(
        images, decoded, quantized.losses, fake_logits=None, last_layer=model.last_layer, step=0
    )
    torch.testing.assert_close(terms["l1"].double(), want["rec_l1"], **LOSS)
    torch.testing.assert_close(terms["lpips"].double(), want["p_loss_rulefilledVGG"], **LOSS)
    torch.testing.assert_close(total.detach().double(), want["loss_val_rulefilledVGG"], **LOSS)
    total.backward(retain_graph=True)
    gradients = {OUR_NAMES.get(name, name): parameter.grad for name, parameter in model.named_parameters()}
    for name, norm in norms["_grad_norms_loss_val_s64"].items():
        torch.testing.assert_close(gradients[name].norm().item(), norm, rtol=2e-3, atol=0, msg=name)
    for leaf in ("weight", "bias") if variant.startswith("lc") else ():
        assert_gradient(gradients[f"codebook_projection.{leaf}"], want[f"grad_codebook_projection_{leaf}"])

    fake, real = discriminator(decoded), discriminator(images)
    torch.testing.assert_close(fake.detach(), want["disc_logits_fake_eval"], **CLOSE)
    torch.testing.assert_close(real.detach(), want["disc_logits_real_eval"], **CLOSE)
    total, terms = objective.autoencoder_loss(
        images, decoded, quantized.losses, fake_logits=fake, last_layer=model.last_layer, step=0
    )
    torch.testing.assert_close(terms["adversarial"].double(), want["g_loss"], **LOSS)
    torch.testing.assert_close(
        terms["adversarial_weight"].double(), want["adaptive_d_weight_times_rate_d"], rtol=1e-2, atol=0
    )
    torch.testing.assert_close(total.detach().double(), want["loss_train_after_disc_start_rulefilledVGG"], **LOSS)
    discriminator_loss, _ = objective.discriminator_loss(real, fake, step=0, images=images, discriminator=discriminator)
    torch.testing.assert_close(discriminator_loss.detach().double(), want["d_loss_hinge_eval"], **LOSS)


@pytest.mark.parametrize("size", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_ema_after_one_update(expected: Expected, autoencoder: Autoencoders, image: Image, size: int) -> None:
    want = expected("vqgan_lc/ema_f16")
    model = autoencoder("ema_f16")
    fresh = build_quantizer(VARIANTS["ema_f16"])
    fresh.load_state_dict(model.quantizer.state_dict())
    with torch.no_grad():
        latent = model.latent(image(size))
        fresh.update(latent, fresh(latent).ids)
    torch.testing.assert_close(fresh.counts, want[f"s{size}_ema_cluster_size_after1"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(fresh.sums, want[f"s{size}_ema_embed_avg_after1"], **CLOSE)
    torch.testing.assert_close(fresh.codebook(), want[f"s{size}_ema_codebook_after1"], rtol=1e-3, atol=1e-6)


def as_latent(rows: Tensor, batch: int = 4) -> Tensor:
    """Reshape rows in the order b, h, w to float[B, C, h, w]."""
    side = int((len(rows) // batch) ** 0.5)
    return rows.view(batch, side, side, -1).permute(0, 3, 1, 2).contiguous()


def test_quantizer_alone(expected: Expected) -> None:
    want = expected("vqgan_lc/quantizer_alone")
    z = torch.randn(4096, 8, generator=torch.Generator().manual_seed(1))
    codes = torch.randn(5000, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(z, want["z"], rtol=0, atol=0)
    torch.testing.assert_close(codes, want["codes"], rtol=0, atol=0)
    quantizer = build_quantizer(VqConfig(codebook_size=5000, code_dim=8))
    quantizer.codes.data.copy_(codes)
    latent = as_latent(z).requires_grad_()
    quantized = quantizer(latent)
    assert_ids(quantized.ids, want["indices_ref_l2"], want["top2_dist_gap"], 1e-5)
    assert_ids(quantized.ids, want["indices_f64_l2_own"], want["top2_dist_gap"], 1e-5)
    distances = (to_rows(latent) - to_rows(quantized.codes)).square().sum(1).detach()
    torch.testing.assert_close(distances, want["min_dist"], rtol=1e-4, atol=1e-5)
    loss = quantizer_loss(quantized.losses)
    torch.testing.assert_close(loss.detach().double(), want["qloss"], **LOSS)
    loss.backward()
    assert_gradient(to_rows(latent.grad), want["grad_z"])
    assert_gradient(quantizer.codes.grad, want["grad_codes"])

    cosine = build_quantizer(VqConfig(codebook_size=5000, code_dim=8, metric="cosine"))
    cosine.codes.data.copy_(codes)
    agree = cosine(latent).ids.flatten() == want["indices_cosine_own"]
    assert agree.float().mean() > 0.999


def test_quantizer_with_projector(expected: Expected) -> None:
    want = expected("vqgan_lc/quantizer_projector")
    quantizer = build_quantizer(LcConfig(codebook_size=5000))
    quantizer.load_codebook(torch.randn(5000, 768, generator=torch.Generator().manual_seed(3)))
    linear = quantizer.projector[0]
    linear.weight.data.copy_(0.05 * torch.randn(8, 768, generator=torch.Generator().manual_seed(4)))
    linear.bias.data.copy_(0.1 * torch.randn(8, generator=torch.Generator().manual_seed(5)))
    torch.testing.assert_close(quantizer.codebook(), want["projected_codes"], **CLOSE)
    latent = as_latent(torch.randn(4096, 8, generator=torch.Generator().manual_seed(1)))
    quantized = quantizer(latent)
    assert_ids(quantized.ids, want["indices_ref_l2"], want["top2_dist_gap"], 1e-5)
    loss = quantizer_loss(quantized.losses)
    torch.testing.assert_close(loss.detach().double(), want["qloss"], **LOSS)
    loss.backward()
    assert_gradient(linear.weight.grad, want["grad_projection_weight"])
    assert_gradient(linear.bias.grad, want["grad_projection_bias"])

    cosine = build_quantizer(LcConfig(codebook_size=5000, metric="cosine"))
    cosine.load_state_dict(quantizer.state_dict())
    agree = cosine(latent).ids.flatten() == want["indices_cosine_own"]
    assert agree.float().mean() > 0.999
