"""Networks with parameters: autoencoders around a quantizer, and the discriminator that trains them."""

from vqpipe.models.autoencoder import Autoencoder, AutoencoderConfig, Reconstruction, build_autoencoder
from vqpipe.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from vqpipe.models.vqgan import Vqgan, VqganConfig

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "DiscriminatorConfig",
    "PatchDiscriminator",
    "Reconstruction",
    "Vqgan",
    "VqganConfig",
    "build_autoencoder",
]
