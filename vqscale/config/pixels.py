"""The tokenizer of kind `pixels`: the images themselves are the codes."""

from __future__ import annotations

from typing import ClassVar, Literal

from vqscale.config.tokenizer_base import TokenizerSection
from vqscale.data.manifest import CodeLevel


class Pixels(TokenizerSection):
    """No network: the 256 values of a colour are the codes, so that a prior models the images themselves.

    The levels `red`, `green` and `blue` have the side of the images. A prior comes to them in this order and factorises
    p(red) p(green | red) p(blue | red, green). Decoding loses nothing, so bits per dimension are the prior's. The stage
    trains nothing: of `training` only what has to fit the data counts.
    """

    title: ClassVar[str] = "No tokenizer: pixels"
    tags: ClassVar[tuple[str, ...]] = ("pixels",)
    ordered: ClassVar[bool] = True
    kind: Literal["pixels"]
    """Pixels."""
    channels: Literal["rgb", "grey"] = "rgb"
    """`grey` has one level, `grey`: the luminance of the images (ITU-R 601); likelihoods are those of grey images."""

    @property
    def colours(self) -> int:
        """Values of a pixel."""
        return 3 if self.channels == "rgb" else 1

    def levels_of(self, image_size: int) -> tuple[CodeLevel, ...]:
        """A level for each colour; the prior's first one stands last."""
        names = ("blue", "green", "red") if self.channels == "rgb" else ("grey",)
        return tuple(CodeLevel(name=name, grid=image_size, codes=256) for name in names)
