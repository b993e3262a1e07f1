"""The prior over the code grids of all levels: networks that share the levels, the coarsest first."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vqscale.models.generate import Draws, Sampling
from vqscale.models.network import Network, unknown

_SHARE = 0.8
"""Of a GPU's free memory, what samples that are drawn together may take; the rest is for what is not counted."""


class Prior(nn.Module):
    """The product of its networks' likelihoods, each given the levels of those before it.

    Args:
        networks: the first models the coarsest levels, each of the others the next finer ones, given all before.
        label_smoothing: share of the target that training spreads over all codes.
        bf16: whether it is trained under bf16 autocast. GPUs then draw in bf16 too, where a network has large matrices;
            CPUs draw in fp32, so that rows depend neither on the batch nor on threads.
    """

    def __init__(self, networks: Sequence[Network], label_smoothing: float = 0.0, *, bf16: bool = False) -> None:
        super().__init__()
        self.bf16 = bf16
        self.networks = nn.ModuleList(networks)
        self.label_smoothing = label_smoothing
        self.classes, self.no_class = networks[0].classes, networks[0].no_class
        self.grids = tuple(grid for network in networks for grid in network.grids)
        """All levels, the coarsest first."""
        self.length = sum(grid.values for grid in self.grids)
        """Codes of a sample, or values of continuous latents."""
        self.chances = sum(network.chances for network in networks)
        """Uniform numbers that `forward` takes for each sample."""
        self.wanted = max(network.wanted for network in networks)
        """Training images that it has to `see` once before all else."""
        self.exact = all(network.exact for network in networks)
        """Whether `forward` is the likelihood; else it estimates an upper bound of its nats."""
        self.units = tuple(dict.fromkeys(unit for network in networks for unit in network.units))
        """Modules that a strategy shards, recomputes and compiles each as one; none lies inside another."""

    def forward(self, codes: Sequence[Tensor], classes: Tensor, chance: Tensor | None = None) -> list[Tensor]:
        """Nats of each sample's codes, summed over the cells of a level: fp32 [B] a level, the coarsest first.

        Args:
            codes: int64 [B, side, side] a level, the coarsest first.
            classes: int64 [B].
            chance: fp32 [B, chances], uniform in [0, 1); None makes them from the codes, so that what is found for a
                sample depends on nothing else.
        """
        if chance is None:
            chance = _chance(codes, self.chances)
        parts = chance.split([network.chances for network in self._networks()], dim=1)
        smoothing = self.label_smoothing if self.training else 0.0
        found: list[Tensor] = []
        for network, part in zip(self._networks(), parts, strict=True):
            first, last = len(found), len(found) + len(network.grids)
            found += network.nats(codes[:first], codes[first:last], classes, part, smoothing)
        return found

    def classes_of(self, labels: Tensor) -> Tensor:
        """The class of each label int64 [B]: none where there is no label (negative), or one that it does not know."""
        return torch.where(labels < 0, self.no_class, labels).clamp(max=self.no_class)

    def see(self, first: int, posteriors: Sequence[Tensor], classes: Tensor) -> None:
        """Show some of the `wanted` images to every network; `posteriors` of all levels, the coarsest first."""
        for network in self._networks():
            network.see(first, posteriors[: len(network.given) + len(network.grids)], classes)

    @torch.no_grad()
    def generate(
        self, classes: Tensor, seeds: Sequence[int], sampling: Sampling, known: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Draw one set of latents a class entry, a level, the coarsest first; on a GPU as many at once as fit.

        Args:
            classes: int64 [B].
            seeds: one a sample. All randomness of a sample comes from its seed, so it depends neither on the batch
                nor on the number of ranks.
            sampling: temperature, truncation, guidance.
            known: what stays as it is, a level, the coarsest first, as for `Network.sample`. None draws all.
        """
        if known is None:
            known = [unknown(grid, len(classes), classes.device) for grid in self.grids]
        size = self._at_once(sampling, classes.device) or max(1, len(classes))
        parts = [slice(start, start + size) for start in range(0, max(1, len(classes)), size)]
        drawn = [self._draw(classes[part], seeds[part], sampling, [grid[part] for grid in known]) for part in parts]
        return [torch.cat(grids) for grids in zip(*drawn, strict=True)]

    def drawing_dtype(self, device: torch.device) -> torch.dtype | None:
        """In which networks multiply while they draw; None: that of their weights."""
        return torch.bfloat16 if self.bf16 and device.type == "cuda" else None

    def _at_once(self, sampling: Sampling, device: torch.device) -> int | None:
        """Samples that fit into the device's memory together; None: any number."""
        free, dtype = free_memory(device), self.drawing_dtype(device) or torch.float32
        row = max(network.row_bytes(dtype) for network in self._networks())
        if free is None or not row:
            return None
        return max(1, int(_SHARE * free / row) // (2 if sampling.guided else 1))

    def _draw(self, classes: Tensor, seeds: Sequence[int], sampling: Sampling, known: Sequence[Tensor]) -> list[Tensor]:
        draws = Draws(sampling, seeds, classes.device, self.drawing_dtype(classes.device))
        grids: list[Tensor] = []
        for network in self._networks():
            wanted = known[len(grids) : len(grids) + len(network.grids)]
            grids += network.sample(grids, classes, draws, wanted)
        return grids

    def _networks(self) -> Iterator[Network]:
        for network in self.networks:
            assert isinstance(network, Network)
            yield network


def free_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that nobody has, or torch keeps without use; None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _chance(codes: Sequence[Tensor], count: int) -> Tensor:
    """Uniform numbers fp32 [B, count], each sample's from its codes alone."""
    flat = torch.cat([grid.flatten(1) for grid in codes], dim=1)
    if not count:
        return torch.empty(len(flat), 0, device=flat.device)
    seeds = [zlib.crc32(row.tobytes()) for row in flat.cpu().numpy()]
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(flat.device)
