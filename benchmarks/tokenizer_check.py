"""Whether our network and the plain one compute the same, and whether the formulas count what torch counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Bench
from benchmarks.tokenizer_cost import Convolution, OperandBytes
from benchmarks.tokenizer_peers import PlainVQVAE2
from vqscale.models.quantizer import Codebook
from vqscale.models.vqvae import VQVAE

_CODES, _FAR, _LOSS, _GRADIENT = 0.002, 0.05, 1e-4, 0.01
"""Where two codes are equally near, rounding decides; a code of the upper level that differs changes all around it."""


def check_cost(bench: Bench, layers: Sequence[Convolution], batch: int, size: int, step: Callable[[], object]) -> None:
    """Formulas against what is counted while `step` trains on a batch, in numbers of `size` bytes."""
    with FlopCounterMode(display=False) as counter, OperandBytes() as operands:
        step()
    flops = batch * sum(layer.training_flops for layer in layers)
    bench.check(
        "flops",
        "difference of the formula's operations to FlopCounterMode's, in a step of ours; it cannot see vqscale::assign",
        abs(flops - counter.get_total_flops()),
        0,
    )
    moved = sum(layer.training_bytes(batch, size) for layer in layers)
    bench.check("bytes", "the same for the operands of convolutions, in bytes", abs(moved - operands.total), 0)


def check_networks(bench: Bench, ours: VQVAE, plain: PlainVQVAE2, images: Tensor, commitment: float) -> None:
    """Outputs, codes, loss and gradients of both in fp32 with equal weights and random codes.

    Args:
        bench: keeps the comparisons.
        ours: stays as it is.
        plain: gets the weights of `ours`, and other codes.
        images: [B, 3, S, S].
        commitment: weight of its loss.
    """
    mine, theirs = (sum(p.numel() for p in network.parameters()) for network in (ours, plain))
    bench.check("parameters", "difference of the numbers of parameters", abs(mine - theirs), 0)
    ours = copy.deepcopy(ours)
    _spread(ours)
    plain.take(ours)
    output = ours(images)
    rebuilt, codes, loss = plain(images)
    loss = loss + F.mse_loss(rebuilt, images)
    own = F.mse_loss(output.images, images) + commitment * sum(level.commitment for level in output.levels)
    for name, level, other in zip(("bottom", "top"), output.levels, codes, strict=True):
        differing = float((level.codes != other).float().mean())
        bench.check(f"codes_{name}", "share of codes that differ from the plain network's, in fp32", differing, _CODES)
    far = (output.images - rebuilt).abs() > 1e-3 * rebuilt.std()
    what = "share of values of the reconstructions that differ by more than 0.001 of their deviation, in fp32"
    bench.check("images", what, float(far.float().mean()), _FAR)
    bench.check("loss", "relative difference of the losses, in fp32", float((own / loss - 1).detach().abs()), _LOSS)
    gradients = [_gradient(network, value) for network, value in ((ours, own), (plain, loss))]
    apart = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    bench.check("gradients", "length of the gradients' difference, relative to the plain one's", apart, _GRADIENT)


@torch.no_grad()
def _spread(network: VQVAE) -> None:
    """Random codes: those that begin on latents lie so near to each other that the peer's distances, which are not
    centred, often take another one.
    """
    for book in network.codebooks:
        assert isinstance(book, Codebook)
        book.codes.copy_(torch.randn_like(book.codes) * book.codes.abs().mean())


def _gradient(network: nn.Module, loss: Tensor) -> Tensor:
    parameters = list(network.parameters())
    return torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, parameters)])
