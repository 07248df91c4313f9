"""Section [eval]."""

from dataclasses import dataclass
from typing import Literal

from vqpipe.config import check_choices, check_range, resumable
from vqpipe.errors import ConfigError
from vqpipe.metrics.protocols import Name

SetMetric = Literal["kid", "prc", "sfid", "is"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Section [eval]: how a tokenizer is measured."""

    protocol: tuple[Name, ...] | Name = "adm"
    """The protocols of the evaluation (see `protocols`): one, or several at once. The first gives the headline
    numbers."""
    image_size: int | str = 256
    """Side of the square center crops, pixels; "2560x1440" (width x height) for rectangles; "native": whole images."""
    tile: int | None = None
    """Images with a longer side are reconstructed in overlapping tiles of this side, pixels. That bounds memory, and
    differs from the reconstruction in one piece. None: always in one piece."""
    batch_size: int = resumable(default=32)
    """Images reconstructed at once by a rank; 1 with native sizes and with tiles."""
    max_skipped: float = 0.0
    """Largest share of unreadable images before the evaluation is refused, 0..1."""
    fid_min_images: int = 2049
    """With fewer images rfid is not computed: below the 2,048 feature dimensions the covariance has no full rank."""
    metrics: tuple[SetMetric, ...] = ()
    """Further metrics of Inception's features: kid, prc (precision and recall), sfid, is (Inception Score)."""
    feature_memory: float = 4.0
    """Memory for the features of kid, prc and is, GB over all ranks, for each protocol; beyond it they are not
    computed."""
    save_seconds: float = resumable(default=60.0)
    """Seconds between two saved states of a rank, from which the same command resumes; up to half an hour if
    saving takes long."""
    num_pictures: int = 12
    """Images that the report shows, spread evenly over the set."""
    num_extremes: int = 3
    """Images with the lowest PSNR that the report shows, and as many with the highest."""
    prefixes: bool = True
    """Measure also the reconstructions from the first k groups alone, k = 1..G, of a tokenizer with G > 1 groups or
    depths: one encoding and G decodings per image (the k-curve of MGVQ, Table 6)."""

    def __post_init__(self) -> None:
        check_choices(self, "eval")
        sizes = ("image_size",) if isinstance(self.image_size, int) else ()
        check_range(self, "eval", "[1, inf)", "batch_size", "tile", *sizes)
        check_range(self, "eval", "[0, inf)", "num_pictures", "num_extremes", "feature_memory", "save_seconds")
        check_range(self, "eval", "[2, inf)", "fid_min_images")
        check_range(self, "eval", "[0, 1]", "max_skipped")
        for name, values in (("protocol", self.protocols), ("metrics", self.metrics)):
            if len(set(values)) != len(values):
                raise ConfigError(f"eval.{name} names one twice: {', '.join(values)}", "Name each once")
        if not self.protocols:
            raise ConfigError("eval.protocol names none", "Leave it out for adm")

    @property
    def protocols(self) -> tuple[Name, ...]:
        """The names, in order."""
        return (self.protocol,) if isinstance(self.protocol, str) else self.protocol
