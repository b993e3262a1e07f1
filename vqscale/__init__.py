"""vqscale: distributed training of discrete image models.

from vqscale import load_tokenizer
tokenizer = load_tokenizer("runs/latest")
codes = tokenizer.encode(images)     # uint8 [B, S, S, 3] -> {"bottom": uint16 [B, 8, 8], "top": ...}
images = tokenizer.decode(codes)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vqscale.version import __version__

if TYPE_CHECKING:
    from vqscale.loading import load_prior, load_tokenizer

__all__ = ["__version__", "load_prior", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    # torch is imported on first use only: the launcher imports this package too.
    if name in __all__:
        from vqscale import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'vqscale' has no attribute '{name}'")
