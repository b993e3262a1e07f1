"""Features of images, by a network that the user names: what FID, Inception Score, precision and recall are made of.

The network is a TorchScript file. That of the published figures is Inception v3 as NVIDIA distributes it,
`inception-2015-12-05.pt` (Karras et al. 2021): it takes uint8 images and resizes them as the original TensorFlow graph
does, so figures compare with those of others. TorchScript is a program: take it from whom you trust. Its hash stands in
the report.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale import storage
from vqscale.errors import UserError


@dataclass(frozen=True)
class FeatureNetwork:
    """A scripted network, on its device."""

    network: torch.jit.ScriptModule
    sha256: str
    """Of the file."""
    device: torch.device
    classifies: bool
    """Whether it knows class probabilities too, which the Inception Score needs."""

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> tuple[Tensor, Tensor | None]:
        """Features fp32 [n, D], and class probabilities fp32 [n, C] or None, of images uint8 [n, H, W, 3]."""
        batch = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).contiguous()
        if not self.classifies:
            return self.network(batch).flatten(1).float(), None
        features = self.network(batch, return_features=True).flatten(1).float()
        # Without the bias of the last layer, as in the original Inception Score.
        return features, self.network(batch, no_output_bias=True).float()

    def width(self, size: int) -> int:
        """Number of features of an image of so many pixels a side."""
        return self(_blank(size))[0].shape[1]

    def classes(self, size: int) -> int:
        """Number of classes that it tells apart; 0 where it classifies nothing."""
        probabilities = self(_blank(size))[1]
        return 0 if probabilities is None else probabilities.shape[1]


def _blank(size: int) -> NDArray[np.uint8]:
    return np.zeros((1, size, size, 3), np.uint8)


def load_features(url: str, device: torch.device) -> FeatureNetwork:
    """A feature network from a path or a URL.

    A network whose forward takes `return_features` and `no_output_bias` classifies; of any other, what it returns for
    uint8 images [n, 3, H, W] are the features.

    Raises:
        UserError: the file is absent, or is not TorchScript.
    """
    data = storage.read_bytes(url)
    try:
        network = torch.jit.load(io.BytesIO(data), map_location=device).eval()
    except RuntimeError as error:
        mend = "give a file that torch.jit.save has written, such as inception-2015-12-05.pt"
        raise UserError(f"is not TorchScript ({str(error).splitlines()[0]})", where=url, mend=mend) from None
    takes = {argument.name for argument in network.forward.schema.arguments}
    classifies = {"return_features", "no_output_bias"} <= takes
    return FeatureNetwork(network, hashlib.sha256(data).hexdigest(), device, classifies)
