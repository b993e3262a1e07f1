"""What differs between the stages that train; the loop does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor

from vqscale.config.recipe import Recipe
from vqscale.training.dashboard import Charts
from vqscale.training.engine import Engine
from vqscale.training.pieces import Piece
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatch

Batch = TypeVar("Batch")


class Task(ABC):
    """What differs between stages. Every method runs on every rank and may use collectives."""

    engine: Engine
    parts: Mapping[str, int] = {}
    """What a sample consists of, if speed is counted in that too: name and number, such as `tokens`."""

    alive: Callable[[], None] | None = None
    """A sign of life, if somebody watches for them; the loop sets it."""

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same held-out batches, a sign of life with each: all of them may take longer than a silence may last."""
        for batch in batches:
            if self.alive:
                self.alive()
            yield batch

    @classmethod
    def charts(cls, recipe: Recipe) -> Charts:
        """What TensorBoard opens on: the charts that matter most, without curves that another stage has too."""
        return {}

    def before_step(self, batch: DeviceBatch) -> None:
        """Called before each step's forward passes, with all of this rank's samples."""

    @abstractmethod
    def losses(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """Forward of a micro-batch, of which a step may have several: scalars by name, `total` is minimised."""

    def after_step(self) -> None:
        """Called once after each successful optimizer step."""

    def figures(self) -> dict[str, float]:
        """Further figures of the last step, equal on all ranks."""
        return {}

    def pieces(self) -> list[Piece]:
        """What a checkpoint holds besides the engine's pieces and lies over the ranks as the weights do."""
        return []

    def extra_state(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds besides all pieces, by name; whole on every rank, rank 0's is saved."""
        return {}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `extra_state` gave; the same on every rank."""

    def check(self, step: int) -> None:
        """Compare ranks; raises when they differ."""

    def sample_flops(self) -> int:
        """Floating-point operations of one sample's forward; collective. 0 where they are not counted."""
        return 0

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Figures over the held-out data."""

    def pictures(self, step: int, tracker: Tracker | None) -> None:
        """Draw into TensorBoard. `tracker` is None on all ranks but 0: they take part in collectives alone."""
