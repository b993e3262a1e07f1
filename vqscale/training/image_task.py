"""What all kinds of tokenizer have in common as tasks: held-out images, pictures, the averaged weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.config.tokenizer_base import TokenizerSection
from vqscale.errors import UserError
from vqscale.models.pixels import from_uint8
from vqscale.training.averaging import AveragedWeights
from vqscale.training.engine import Engine
from vqscale.training.pieces import Piece
from vqscale.training.task import Task
from vqscale.training.tracking import Tracker
from vqscale.training.utilisation import forward_flops


class ImageTask(Task):
    """A tokenizer in training, by its kind.

    With `ema_decay`, validation and pictures use the averaged weights and the plain buffers, as extraction and export
    do (`averaging.AveragedWeights`).

    Args:
        engine: over the tokenizer's network.
        settings: the recipe's tokenizer.
        levels: level names, the finest first.
        seed: the run's seed.
        held_out: makes an iteration over this rank's share of the held-out images, uint8 [B, S, S, 3].
        fixed: images uint8 [n, S, S, 3] that are drawn into TensorBoard again and again.
    """

    beside: ClassVar[str] = "`ema_decay`"
    """Settings with a state beside the network, without which it cannot be resumed."""

    def __init__(
        self,
        engine: Engine,
        settings: TokenizerSection,
        levels: Sequence[str],
        seed: int,
        held_out: Callable[[], Iterable[NDArray[np.uint8]]],
        fixed: NDArray[np.uint8],
    ) -> None:
        self.engine, self._names, self._seed = engine, tuple(levels), seed
        self._held_out, self._fixed = held_out, fixed
        self.parts = {"tokens": sum(level.grid**2 for level in settings.levels_of(fixed.shape[1]))}
        decay = settings.average_decay
        self._averaged = AveragedWeights(engine.weights, decay) if decay else None
        self._ready = False  # whether what goes beside the network belongs to its step

    @property
    @abstractmethod
    def measured(self) -> tuple[str, ...]:
        """Names of what `measure` gives."""

    @abstractmethod
    def measure(self, network: Any, images: NDArray[np.uint8]) -> list[Tensor]:
        """Figures of each held-out image uint8 [B, S, S, 3]: fp64 [B] on the CPU, one for each of `measured`."""

    @abstractmethod
    def draw(self, network: Any, step: int, tracker: Tracker) -> None:
        """Draw the fixed images as the network has them; on rank 0 alone."""

    def sample_flops(self) -> int:
        """Of the convolutions of encoders and decoders, for one image; the search and the losses are left out."""
        with self.engine.evaluated() as network:
            return forward_flops(network, *self.inputs(from_uint8(self._fixed[:1], self.engine.ranks.device)))

    def inputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the network's forward takes of images [B, 3, S, S]."""
        return (images,)

    def validate(self) -> dict[str, float]:
        """What is `measured` of the held-out images, a mean over images."""
        names = self.measured
        sums = torch.zeros(len(names) + 1, dtype=torch.float64)
        with self._judged() as network:
            for images in self.watched(self._held_out()):
                values = self.measure(network, images)
                sums += torch.stack([*(value.sum() for value in values), torch.tensor(len(images)).double()])
        *totals, count = self.engine.ranks.sum(sums.to(self.engine.ranks.device)).tolist()
        return {name: total / count for name, total in zip(names, totals, strict=True)}

    @torch.no_grad()
    def pictures(self, step: int, tracker: Tracker | None) -> None:
        """The fixed images beside their reconstructions, and what else the kind has to show."""
        with self._judged() as network:
            if tracker:
                self.draw(network, step, tracker)

    def pieces(self) -> list[Piece]:
        """The averaged weights."""
        return self._averaged.pieces() if self._averaged else []

    @property
    def keeps(self) -> bool:
        """Whether there is a state beside the network's."""
        return self._averaged is not None

    def require_state(self) -> None:
        """Average, and what else lies beside the network, of another step would go wrong in silence.

        Raises:
            UserError: the checkpoint did not have it.
        """
        if not self._ready and self.keeps:
            raise UserError(
                f"resumed without the state of {self.beside}",
                where="tokenizer",
                mend="resume from a checkpoint that was trained with these settings",
            )

    @contextmanager
    def _judged(self) -> Iterator[Any]:
        """The network to judge, whole, in evaluation: with the averaged weights if there are any; collective."""
        self.require_state()
        averaged = self._averaged.applied() if self._averaged else nullcontext()
        with averaged, self.engine.evaluated() as network:
            yield network


def squared_errors(rebuilt: Tensor, images: Tensor) -> list[Tensor]:
    """Mean squared error and PSNR in dB of each image, fp64 [B] on the CPU; both [B, 3, S, S] in [-1, 1], as [0, 1]."""
    mse = ((rebuilt.float().clamp(-1, 1) - images) / 2).square().flatten(1).mean(dim=1).double().cpu()
    return [mse, -10 * mse.clamp(min=1e-10).log10()]
