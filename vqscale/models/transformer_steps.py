"""A transformer's single steps, by which codes are drawn: one position of all sequences at a time.

The cache of keys and values is allocated once. A step is a function of tensors alone, the position among them, so that
a GPU can record it as a CUDA graph: there it looks at the cache up to the end of a stretch of positions, and masks what
is not yet filled. On a CPU it looks at what is filled. A row of what comes out depends neither on the other rows nor on
the number of threads there (`steady`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.generate import Draws
from vqscale.models.steady import Linear, steady
from vqscale.models.steady_block import SteadyBlock
from vqscale.models.transformer_block import Block, attend
from vqscale.models.transformer_body import TransformerBody

STRETCH = 256
"""Positions for which one CUDA graph is recorded; so many positions of the cache are read in vain at most."""


class BlockSteps:
    """A block with its cache: keys and values [B, groups, T, d] of all positions.

    Args:
        block: whose weights are taken.
        rows: B.
        length: T.
        dtype: as for `Decoder`.
    """

    def __init__(self, block: Block, rows: int, length: int, dtype: torch.dtype | None = None) -> None:
        shape, weight = block.shape, block.project.weight
        self._block = SteadyBlock(block, dtype)
        # Zeros: what is masked may not be NaN, of which even nothing is NaN.
        self._keys = weight.new_zeros(rows, shape.groups, length, shape.head_width, dtype=dtype)
        self._values = torch.zeros_like(self._keys)

    def run(self, x: Tensor, at: Tensor, end: int, mask: Tensor | None, turns: Tensor | None) -> Tensor:
        """A new position [B, 1, width] of the residual stream through the block.

        Args:
            x: the stream.
            at: int64 [1], the position.
            end: how much of the cache is looked at.
            mask: bool [1, 1, 1, end], what of that is filled; None: all of it.
            turns: rotations [2, 1, d / 2] of the position.
        """

        def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._keys.index_copy_(2, at, key)
            self._values.index_copy_(2, at, value)
            return attend(query, self._keys[:, :, :end], self._values[:, :, :end], mask)

        return self._block(x, turns, mix)


class Decoder:
    """All sequences of a batch, as far as they are drawn.

    Args:
        network: in evaluation mode; its weights are those of the moment.
        classes: int64 [B].
        context: what the given levels say of the first level's cells, [B, side², width].
        dtype: of matrices, keys and values; None: that of the weights. The residual stream and norms keep that.
    """

    def __init__(
        self,
        network: TransformerBody,
        classes: Tensor,
        context: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.network = network
        self._context = context
        self._blocks = [BlockSteps(_block(block), len(classes), network.length, dtype) for block in network.blocks]
        self._heads = [_linear(head, dtype) for head in network.heads]
        self._everywhere = network.class_everywhere(classes)[:, None]
        # History: the class, then the codes, each numbered over all levels as rows of one table. Column 0, the class,
        # also stands for "nothing there": in the tables of codes above and over a cell its rows are zero.
        self._history = classes.new_zeros(len(classes), 1 + network.length)
        self._history[:, 0] = classes
        self._tables = _tables(network)
        self._columns, self._offsets = _columns(network).to(classes.device), _offsets(network).to(classes.device)
        self._places = torch.cat(
            [place.expand(length, -1) for place, length in zip(network.positions, network.lengths, strict=True)]
        )

    def logits(self, level: int, at: Tensor, end: int, *, masked: bool = False) -> Tensor:
        """Logits [B, K] of the codes at one position; those before it have to be put there.

        Args:
            level: the position's.
            at: int64 [1], the position.
            end: how much of the cache is looked at; above `at`.
            masked: whether `end` may be more than `at` + 1.
        """
        mask = (torch.arange(end, device=at.device) <= at).view(1, 1, 1, end) if masked else None
        x = self._places[at] + self._everywhere
        for table, columns in zip(self._tables, self._columns, strict=True):
            x = x + F.embedding(self._history.index_select(1, columns[at]), table)
        if self._context is not None and level == 0:
            x = x + self._context[:, at]
        turns = None if self.network.turns is None else self.network.turns[:, at]
        for block in self._blocks:
            x = block.run(x, at, end, mask, turns)
        return self._heads[level](self.network.norm(x[:, 0]))

    def put(self, codes: Tensor, at: Tensor) -> None:
        """Codes int64 [B] at a position int64 [1]."""
        self._history.index_copy_(1, at + 1, codes[:, None] + self._offsets[at])

    def codes(self) -> list[Tensor]:
        """Code grids int64 [B, side, side] of all levels."""
        flat = (self._history[:, 1:] - self._offsets).split(self.network.lengths, dim=1)
        return [part.unflatten(1, (grid.side, grid.side)) for part, grid in zip(flat, self.network.grids, strict=True)]


class Walk:
    """Draws position after position; what differs between CPU and GPU is how a step is called.

    Args:
        decoder: with nothing drawn.
        draws: how codes are drawn.
        known: int64 [B, T]: codes that stay as they are; negative where one is drawn.
    """

    def __init__(self, decoder: Decoder, draws: Draws, known: Tensor) -> None:
        self.decoder, self._draws, self._known = decoder, draws, known
        self._uniforms = draws.uniforms(decoder.network.length)
        self._scales = draws.sampling.scales(decoder.network.length).to(known.device)
        self._at = torch.zeros(1, dtype=torch.int64, device=known.device)

    def level(self, level: int, start: int, stop: int) -> None:
        """Draw the positions from `start` to `stop`, all of one level."""
        if self._at.is_cuda:
            self.by_stretches(level, start, stop, record)
            return
        for position in range(start, stop):
            self._at.fill_(position)
            self._step(level, position + 1, masked=False)

    def by_stretches(
        self, level: int, start: int, stop: int, recorded: Callable[[Callable[[], None]], Callable[[], object]]
    ) -> None:
        """The same with one function for all positions of a stretch but the first, which `recorded` makes quicker."""
        for first in range(start, stop, STRETCH):
            last = min(first + STRETCH, stop)

            def advance(last: int = last) -> None:
                self._at.add_(1)
                self._step(level, last, masked=True)

            self._at.fill_(first - 1)
            advance()  # not recorded: kernels are chosen and workspaces allocated here
            again = recorded(advance)
            for _ in range(first + 1, last):
                again()

    def _step(self, level: int, end: int, *, masked: bool) -> None:
        """Draw the codes at the current position; tensors decide everything."""
        logits = self._draws.guide(self.decoder.logits(level, self._at, end, masked=masked), self._scales[self._at])
        drawn = self._draws.codes(logits, self._uniforms.index_select(1, self._at)[:, 0])
        known = self._known.index_select(1, self._at)[:, 0]
        self.decoder.put(self._draws.spread(torch.where(known < 0, drawn, known)), self._at)


def record(work: Callable[[], None]) -> Callable[[], object]:
    """A CUDA graph of what `work` starts on the GPU, as a function; `work` is not carried out."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _tables(network: TransformerBody) -> list[Tensor]:
    """For the code before, the code above and the code over a cell: [classes + 1 + codes of all levels, width]."""
    first = network.class_token.weight
    none = torch.zeros_like(first)
    parts: tuple[tuple[Tensor, Sequence[nn.Module]], ...] = (
        (first, list(network.tokens)),
        (none, list(network.above)),
        (none, list(network.parents)),
    )
    return [torch.cat([front, *(table.get_parameter("weight") for table in rest)]) for front, rest in parts]


def _columns(network: TransformerBody) -> Tensor:
    """Columns of the history, int64 [3, T], in which stand the codes before, above and over each position; 0: none."""
    above, over, start = [], [], 1
    for level, grid in enumerate(network.grids):
        cells = torch.arange(grid.length)
        above.append(torch.where(cells < grid.side, 0, start + cells - grid.side))
        coarser = start - network.lengths[level - 1]
        over.append(coarser + network.parent_cells(level).cpu() if level else torch.zeros_like(cells))
        start += grid.length
    return torch.stack([torch.arange(network.length), torch.cat(above), torch.cat(over)])


def _offsets(network: TransformerBody) -> Tensor:
    """What is added to the code of each position to make it a row of the tables: int64 [T]."""
    parts, offset = [], network.classes + 1
    for grid in network.grids:
        parts.append(torch.full((grid.length,), offset))
        offset += grid.codes
    return torch.cat(parts)


def _linear(layer: nn.Module, dtype: torch.dtype | None) -> Linear:
    assert isinstance(layer, nn.Linear)
    return steady(layer, dtype)


def _block(block: nn.Module) -> Block:
    assert isinstance(block, Block)
    return block
