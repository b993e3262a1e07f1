"""One block of the transformer: attention and feed-forward, each before a norm and added to the residual stream."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["layer", "rms"]
Feed = Literal["gelu", "swiglu"]
Positions = Literal["learned", "rotary"]

_EPS = 1e-5
_FEED_MULTIPLE = 64
_BASE = 10_000.0
_HALF_FROM = 512
"""Shortest sequence for which a CPU with AMX attends faster in bf16 than in fp32 (docs/log.md)."""

_AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))


@dataclass(frozen=True)
class Shape:
    """Size and architecture of a transformer.

    Raises:
        ValueError: heads do not divide what they have to.
    """

    layers: int
    width: int
    heads: int
    dropout: float = 0.0
    key_value_heads: int | None = None
    """Heads of keys and values, each shared by a group of queries (Ainslie et al. 2023); None: one for each query."""
    norm: Norm = "layer"
    """Layer norm without bias, or RMSNorm (Zhang & Sennrich 2019)."""
    feed: Feed = "gelu"
    """GELU with biases as in GPT-2, or SwiGLU without (Shazeer 2020)."""
    feed_width: int | None = None
    """Width inside the feed-forward; None: 4 · width, and 8/3 · width, which has as many weights, for SwiGLU."""
    positions: Positions = "learned"
    """A learned vector for each cell of each level, or one for each level and 2-D rotary positions (Su et al. 2021):
    half of a head turns with the row, half with the column."""

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads % self.groups:
            raise ValueError(f"{self.heads} heads, {self.groups} of keys and values, do not share width {self.width}")
        if self.positions == "rotary" and self.head_width % 4:
            raise ValueError(f"rotary positions need a head's width {self.head_width} to be a multiple of 4")

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.key_value_heads or self.heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def inner(self) -> int:
        """Width inside the feed-forward."""
        if self.feed_width:
            return self.feed_width
        if self.feed == "gelu":
            return 4 * self.width
        return -(-8 * self.width // (3 * _FEED_MULTIPLE)) * _FEED_MULTIPLE

    def cache_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Keys and values of all layers, for each row of a batch of sequences that are drawn."""
        return 2 * self.layers * self.groups * self.head_width * length * dtype.itemsize

    @property
    def projections(self) -> list[int]:
        """Widths of queries, keys and values in the output of their common projection."""
        return [count * self.head_width for count in (self.heads, self.groups, self.groups)]


class SwiGLU(nn.Module):
    """silu(gate) · value, of the two halves of what it is given (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 n] to [..., n]."""
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def make_norm(shape: Shape) -> nn.Module:
    """The norm of a shape. On a CPU torch has no fused RMSNorm; it takes five times as long as layer norm there."""
    if shape.norm == "rms":
        return nn.RMSNorm(shape.width, eps=_EPS)
    return nn.LayerNorm(shape.width, eps=_EPS, bias=False)


def make_feed(shape: Shape) -> nn.Sequential:
    """The feed-forward of a shape: a matrix, what is not linear, a matrix."""
    width, inner = shape.width, shape.inner
    if shape.feed == "gelu":
        return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
    return nn.Sequential(nn.Linear(width, 2 * inner, bias=False), SwiGLU(), nn.Linear(inner, width, bias=False))


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream.

    Args:
        shape: size and architecture.
        causal: whether a position sees none behind it.
    """

    def __init__(self, shape: Shape, causal: bool = True) -> None:
        super().__init__()
        self.shape, self.causal = shape, causal
        self.norm_attention, self.norm_feed = make_norm(shape), make_norm(shape)
        self.query_key_value = nn.Linear(shape.width, sum(shape.projections), bias=False)
        self.project = nn.Linear(shape.width, shape.width, bias=False)
        self.feed = make_feed(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, turns: Tensor | None = None) -> Tensor:
        """A sequence [B, T, width] to the same; position t sees those up to t, or all where it is not causal.

        Args:
            x: the residual stream.
            turns: of the positions, from `rotations`; None without rotary positions.
        """
        x = x + self.dropout(self._attend(self.norm_attention(x), turns))
        return x + self.dropout(self.feed(self.norm_feed(x)))

    def _attend(self, x: Tensor, turns: Tensor | None) -> Tensor:
        query, key, value = split_heads(self.query_key_value(x), self.shape)
        if wide := x.device.type == "cpu" and not (_AMX and x.shape[1] >= _HALF_FROM):
            # Without AMX, torch's bf16 attention on the CPU is several times slower than fp32.
            query, key, value = query.float(), key.float(), value.float()
        if turns is not None:
            query, key = rotate(query, turns), rotate(key, turns)
        with torch.autocast("cpu", enabled=False) if wide else nullcontext():  # which would cast back to bf16
            out = self.mix(query, key, value)
        return self.project(merge_heads(out))

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What each position takes from those that it sees."""
        return attend(query, key, value, causal=self.causal)


def initialise(network: nn.Module, layers: int) -> None:
    """Whatever has two dimensions normal 0.02; projections into the residual stream smaller by depth.

    As Radford et al. (2019) do. Kernels and vectors stay as they are.
    """
    for name, parameter in network.named_parameters():
        if parameter.dim() == 2:
            into_stream = name.endswith(("project.weight", "feed.2.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if into_stream else 0.02)


def split_heads(x: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, heads, n, d], keys and values [B, groups, n, d] from their projection [B, n, ...]."""
    query, key, value = (
        part.unflatten(2, (-1, shape.head_width)).transpose(1, 2) for part in x.split(shape.projections, dim=-1)
    )
    return query, key, value


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, n, d] to [B, n, width]."""
    return x.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = True) -> Tensor:
    """Attention of queries [B, heads, n, d] to keys and values [B, groups, m, d].

    Several queries are those of all m = n positions, and each sees the positions up to its own, or all, or what `mask`
    lets it see. So does a single one.

    Args:
        query: of all heads.
        key: of the groups; group g serves the heads from g · heads / groups on.
        value: as `key`.
        mask: bool, broadcast to [B, 1, n, m]: what each query sees; with it, several queries are not `causal`.
        causal: whether several queries see no positions behind their own.
    """
    batch, heads, count, dim = query.shape
    shared = heads // key.shape[1]
    if shared > 1 and count == 1:  # the group's queries read their keys once, as positions that see the same
        query = query.reshape(batch, key.shape[1], shared, dim)
        return F.scaled_dot_product_attention(query, key, value, mask).reshape(batch, heads, 1, dim)
    if shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal and count > 1)


def rotations(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Cosines and sines fp32 [2, T, dim / 2] by which the pairs of a head turn at places (row, column) [T].

    The first half of the pairs turns with the row, the second with the column (Su et al. 2021, in two dimensions).
    """
    count = dim // 4
    speeds = _BASE ** -(torch.arange(count, device=rows.device) / count)
    angles = torch.cat([rows[:, None] * speeds, columns[:, None] * speeds], dim=1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs of [B, heads, n, d] by [2, n, d / 2], in fp32; keeps the dtype. A pair lies d / 2 apart."""
    cosine, sine = turns
    one, other = x.float().chunk(2, dim=-1)
    return torch.cat([one * cosine - other * sine, one * sine + other * cosine], dim=-1).to(x.dtype)
