"""How far reconstructions are from their images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vqscale.evaluation.hours import HourCounts
from vqscale.evaluation.measures import Shown, Together
from vqscale.evaluation.metrics import SMALLEST_SSIM, Doubles, l1, mse, psnr, ssim
from vqscale.models.lpips import LPIPS
from vqscale.models.pixels import from_uint8


class Reconstructions:
    """MSE, PSNR, L1, SSIM and LPIPS, each a mean over images; on clocks, the hours that they show.

    Args:
        size: side of the images; SSIM is left out of those that are smaller than its window.
        clocks: whether the images are clocks.
        lpips: on its device; None leaves LPIPS out.
    """

    def __init__(self, size: int, *, clocks: bool = False, lpips: LPIPS | None = None) -> None:
        self._lpips, self._with_ssim = lpips, size >= SMALLEST_SSIM
        self._hours = HourCounts() if clocks else None
        self._rows: list[Doubles] = [np.empty((0, 2 + self._with_ssim + (lpips is not None)))]
        self._sums = np.zeros(3)  # of squares, values, and how many; in [0, 1]

    def add(self, shown: Shown) -> None:
        """Measure some images."""
        images, pixels = shown.images, shown.pixels
        columns = [mse(images, pixels), l1(images, pixels)]
        columns += [ssim(images, pixels)] if self._with_ssim else []
        columns += [self._perceived(shown)] if self._lpips else []
        self._rows.append(np.stack(columns, axis=1))
        scaled = images.astype(np.float64) / 255
        self._sums += (scaled**2).sum(), scaled.sum(), scaled.size
        if self._hours:
            self._hours.add(pixels, shown.labels)

    def figures(self, ranks: Together) -> dict[str, Any]:
        """Over all ranks; collective."""
        gathered = ranks.gather((np.concatenate(self._rows), self._sums, self._hours))
        rows = np.concatenate([part[0] for part in gathered])
        squares, sums, pixels = sum(part[1] for part in gathered)
        names = ["mse", "l1", *(["ssim"] if self._with_ssim else []), *(["lpips"] if self._lpips else [])]
        found: dict[str, Any] = {
            "held_out_images": len(rows),
            **{name: float(values.mean()) for name, values in zip(names, rows.T, strict=True)},
            "psnr": float(psnr(rows[:, 0]).mean()),
            "mse_over_variance": float(rows[:, 0].mean() / (squares / pixels - (sums / pixels) ** 2)),
        }
        if self._hours:
            found["hour_accuracy_reconstructed"] = HourCounts().merge(part[2] for part in gathered).accuracy
        return found

    @torch.no_grad()
    def _perceived(self, shown: Shown) -> Doubles:
        assert self._lpips is not None
        device = self._lpips.shift.device
        pair = (from_uint8(images, device) for images in (shown.images, shown.pixels))
        values: Doubles = self._lpips(*pair).double().cpu().numpy()
        return values
