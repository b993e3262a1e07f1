"""What the rest asks of a recipe's tokenizer without knowing its kind, and what hierarchies have in common."""

from __future__ import annotations

import itertools
import math
import operator
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from vqscale.config.section import Decay, Places, Positive, Section
from vqscale.config.training import Training
from vqscale.data.manifest import CodeLevel


class TokenizerSection(Section):
    """What all kinds have in common."""

    title: ClassVar[str]
    """What a model card calls it."""
    tags: ClassVar[tuple[str, ...]]
    """What model hubs find it by."""
    ordered: ClassVar[bool] = False
    """Whether neighbouring codes stand for like things, so that noise may be added to them."""
    kind: str
    """Kind of tokenizer."""
    training: Training
    """Optimisation."""

    @abstractmethod
    def levels_of(self, image_size: int) -> tuple[CodeLevel, ...]:
        """The latents of images of so many pixels a side, the finest level first."""

    def check_images(self, image_size: int) -> None:
        """Whether images of so many pixels a side can be encoded.

        Raises:
            ValueError: they cannot; names both keys and the mend.
        """

    @property
    def colours(self) -> int:
        """Values of a pixel, over which likelihoods are taken."""
        return 3

    @property
    def average_decay(self) -> float:
        """Decay of the average of the weights that takes their place outside of training; 0 where there is none."""
        return 0.0

    @property
    def weights(self) -> Mapping[str, tuple[str, ...]]:
        """Key → files with weights that have to be there."""
        return {}

    def relocated(self, place: Callable[[Places], Places]) -> Self:
        """The same with other names of its files, as `place` makes them."""
        return self

    @model_validator(mode="after")
    def _kernels_take_adamw(self) -> Self:
        if self.training.optimizer == "muon":
            raise ValueError("training.optimizer muon is for the prior's matrices; use adamw")
        return self


class LevelSection(Section):
    """One level of a hierarchy."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name in reports and TensorBoard, such as `bottom` or `top`."""
    downsample: Literal[2, 4, 8, 16]
    """Factor between this level's grid and the level below it (for the first level: the image)."""
    hidden: Annotated[int, Field(ge=2)] | None = None
    """Channels of this level's convolutions, where they differ from `tokenizer.hidden`."""
    residual_blocks: Positive | None = None
    """Residual blocks, where they differ from `tokenizer.residual_blocks`."""
    residual_hidden: Positive | None = None
    """Channels inside a residual block, where they differ from `tokenizer.residual_hidden`."""


class HierarchySection(TokenizerSection):
    """Convolutional encoders and decoders around one or several levels of latents."""

    levels: Annotated[tuple[LevelSection, ...], Field(min_length=1, max_length=4)]
    """From the image upwards: the first is the finest (bottom), the last the coarsest (top)."""
    hidden: Annotated[int, Field(ge=2)] = 128
    """Channels of the convolutions; a level may have its own, as of the next two."""
    residual_blocks: Positive = 2
    """Residual blocks of each encoder and decoder."""
    residual_hidden: Positive = 64
    """Channels inside a residual block."""
    ema_decay: Decay = 0.0
    """Decay of a running average of the weights (less in the first steps: min(decay, (1 + n) / (10 + n))), which
    validation, pictures, extraction and export then use in their place; 0 is none."""

    @property
    def average_decay(self) -> float:
        """Decay of the average of the weights that takes their place outside of training; 0 where there is none."""
        return self.ema_decay

    def sides(self, image_size: int) -> tuple[int, ...]:
        """Side of each level's grid of images of so many pixels a side, the finest level first."""
        downsamplings = itertools.accumulate((level.downsample for level in self.levels), operator.mul)
        return tuple(image_size // total for total in downsamplings)

    def check_images(self, image_size: int) -> None:
        """Whether the sides of all levels are whole numbers; as `TokenizerSection.check_images`."""
        total = math.prod(level.downsample for level in self.levels)
        if image_size % total:
            below = image_size // total * total
            near = [str(n) for n in (below, below + total) if n > 0]
            raise ValueError(
                f"data.image_size {image_size} is not divisible by {total}, the product of "
                f"tokenizer.levels.*.downsample; use {' or '.join(near)}"
            )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names: Sequence[str] = [level.name for level in self.levels]
        if len(set(names)) < len(names):
            raise ValueError(f"levels carry the same name twice ({', '.join(names)}); give each its own")
        return self
