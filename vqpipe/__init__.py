"""Image tokenizers with very large codebooks: images in, discrete tokens out, and back."""

from typing import TYPE_CHECKING, Any

from vqpipe.errors import VqpipeError

if TYPE_CHECKING:
    from vqpipe.quantizers import TokenLayout
    from vqpipe.tokenizer import Tokenizer

__all__ = ["TokenLayout", "Tokenizer", "VqpipeError"]


def __getattr__(name: str) -> Any:
    """Import the names that need torch on first use."""
    if name == "Tokenizer":
        from vqpipe.tokenizer import Tokenizer

        return Tokenizer
    if name == "TokenLayout":
        from vqpipe.quantizers import TokenLayout

        return TokenLayout
    raise AttributeError(f"module 'vqpipe' has no attribute {name!r}")
