"""Terms of the tokenizer's loss: pixels, hinge losses, and the weight that balances the adversarial term."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss}
"""Distances between images in [-1, 1], a mean over all values."""


def generator_loss(fake: Tensor) -> Tensor:
    """Minus the mean of the discriminator's logits of reconstructions (hinge loss, Lim & Ye 2017)."""
    return -fake.float().mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator (Lim & Ye 2017): half of what real logits lack to 1, and fake ones exceed -1."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def kernel_gradient(layer: nn.ConvTranspose2d, features: Tensor, gradient: Tensor) -> Tensor:
    """Gradient with respect to the kernel of `layer`, from its input and the gradient with respect to its output.

    The layer is linear in its kernel, so its values are not needed, and neither is the parameter: this holds under
    strategies that keep a shard of it on each rank, and triggers none of their hooks.

    Args:
        layer: whose shapes count.
        features: [B, in, H, W].
        gradient: [B, out, H', W'].

    Returns:
        fp32 [in, out, k, k].
    """
    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        shape = (layer.in_channels, layer.out_channels, *layer.kernel_size)
        probe = torch.zeros(shape, device=features.device, requires_grad=True)
        output = F.conv_transpose2d(
            features.detach().float(),
            probe,
            stride=layer.stride,
            padding=layer.padding,  # type: ignore[arg-type]
        )
        return torch.autograd.grad(output, probe, gradient.float())[0]


def adaptive_weight(fidelity: Tensor, adversarial: Tensor) -> Tensor:
    """Weight at which both terms pull equally at the last layer (Esser et al. 2021, equation 7), in [0, 10,000].

    As in github.com/CompVis/taming-transformers: the ratio of the gradients' norms, 1e-4 added to the divisor. There
    each rank takes its own ratio; here the gradients are those of the global batch.

    Args:
        fidelity: gradient of reconstruction and perceptual term with respect to the last kernel.
        adversarial: gradient of the generator's loss.
    """
    return (fidelity.norm() / (adversarial.norm() + 1e-4)).clamp(0, 1e4)


def carry(value: Tensor, images: Tensor, gradient: Tensor) -> Tensor:
    """A scalar that has a given value, and a given gradient with respect to `images`.

    Puts a gradient that is known already into a graph: what it was computed from is not run through a second time.
    """
    product = (images * gradient).sum()
    return value.detach() + (product - product.detach())
