"""Settings of the classifiers that the evaluation may train (classification accuracy score)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vqscale.config.section import Fraction, Positive, Section


class Classifier(Section):
    """Classification accuracy score: a small residual network learns the classes from the images of one set alone, and
    is tested on the real held-out images (Ravuri & Vinyals 2019). Every set has as many images as the smallest one.
    """

    sets: Annotated[tuple[Literal["samples", "reconstructions", "images"], ...], Field(min_length=1)] = (
        "samples",
        "reconstructions",
        "images",
    )
    """What a classifier is trained on, one after the other: drawn images, reconstructions of training images, and these
    themselves, which say what can be had."""
    images: Positive = 50_000
    """The most images of a set, from the first on."""
    steps: Positive = 2_000
    """Optimizer steps of each classifier."""
    global_batch: Positive = 128
    """Images of one step over all ranks."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Peak learning rate of SGD with Nesterov's momentum of 0.9; a twentieth of the steps is warm-up, then it falls as
    a cosine to zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """On all weights."""
    width: Annotated[int, Field(ge=8, multiple_of=8)] = 32
    """Channels of the first of three stages; doubled by each further one."""
    blocks: Positive = 1
    """Residual blocks of a stage: 1, 3, 9 make ResNet-8, 20, 56 (He et al. 2016, section 4.2)."""
    shift: Fraction = 0.125
    """Images are shifted at random by up to this share of their side while a classifier learns; they are mirrored
    where `data.flip` says so."""
