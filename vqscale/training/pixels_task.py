"""Stage one where there is nothing to train: the pixels are the codes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vqscale.models.pixels import from_uint8
from vqscale.models.raw_pixels import RawPixels
from vqscale.training.image_task import ImageTask, squared_errors
from vqscale.training.tokenizer_pictures import draw_images
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatch


class PixelsTask(ImageTask):
    """Takes no step; its figures say what of the images is lost: nothing, but for their colours where they are grey."""

    measured = ("mse", "psnr")

    def losses(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """There are none: a network without weights takes no steps."""
        raise AssertionError("nothing is trained")

    def measure(self, network: RawPixels, images: NDArray[np.uint8]) -> list[Tensor]:
        """Error and PSNR of each image against what comes back."""
        pixels = from_uint8(images, self.engine.ranks.device)
        return squared_errors(network.decode(network.encode(pixels)), pixels)

    def draw(self, network: RawPixels, step: int, tracker: Tracker) -> None:
        """The fixed images beside what comes back."""
        rebuilt = network.decode(network.encode(from_uint8(self._fixed, self.engine.ranks.device)))
        draw_images(tracker, step, self._fixed, rebuilt)
