"""Autoencoders with a quantizer, and the discriminator of the adversarial loss."""

from vqpipe.models.autoencoder import Autoencoder, AutoencoderConfig, Reconstruction, build_autoencoder
from vqpipe.models.dcae import Dcae, DcaeConfig
from vqpipe.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from vqpipe.models.magvit import Magvit, MagvitConfig
from vqpipe.models.vitamin import Vitamin, VitaminConfig
from vqpipe.models.vqgan import Vqgan, VqganConfig

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "Dcae",
    "DcaeConfig",
    "DiscriminatorConfig",
    "Magvit",
    "MagvitConfig",
    "PatchDiscriminator",
    "Reconstruction",
    "Vitamin",
    "VitaminConfig",
    "Vqgan",
    "VqganConfig",
    "build_autoencoder",
]
