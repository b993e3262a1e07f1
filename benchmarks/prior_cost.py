"""What a transformer has to compute, to move and to keep, by formula.

A matrix [in, out] multiplies and adds in · out times for each position, and training computes it three times: the
output, the gradient of the input, and that of the matrix. Attention multiplies each query with the keys up to its
position, and as many weights with the values, which half of all pairs of positions are; training computes each of the
two three times.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqscale.models.transformer_block import Shape


@dataclass(frozen=True)
class Cost:
    """Of a network over one level with the default options.

    Args:
        shape: its size.
        codes: of the codebook.
        length: T, positions.
    """

    shape: Shape
    codes: int
    length: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(in, out) of all that each position goes through."""
        shape, width = self.shape, self.shape.width
        block = [(width, sum(shape.projections)), (width, width), (width, shape.inner), (shape.inner, width)]
        return [*block * shape.layers, (width, self.codes)]

    @property
    def weights(self) -> int:
        """Numbers in the matrices, each of which is read for each position that is drawn."""
        return sum(inputs * outputs for inputs, outputs in self.matrices)

    @property
    def matrix_flops(self) -> int:
        """Operations of a training step in matrices, for one sequence; a multiplication and an addition are two."""
        return 3 * 2 * self.weights * self.length

    @property
    def attention_flops(self) -> int:
        """Operations of a training step in attention, for one sequence: of T · T / 2 pairs."""
        return 3 * self.shape.layers * 2 * 2 * self.shape.width * self.length**2 // 2

    def cached(self, position: int) -> int:
        """Numbers of one sequence's cache that are read at a position: keys and values of all layers up to it."""
        return 2 * self.shape.layers * self.shape.groups * self.shape.head_width * (position + 1)
