"""x-transformers' decoder with the layers of ours: layer norm without bias, GELU, learned positions, no dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.transformer_block import Block
from vqscale.models.transformer_body import TransformerBody


class XTransformers(nn.Module):
    """The peer's decoder over [start, c_0, …, c_{T-2}], one level and no classes.

    Args:
        package: x_transformers.
        network: whose size it gets; of one level, with the options of the default.
        flash: whether it attends by torch's fused attention, or as is its default.
    """

    def __init__(self, package: Any, network: TransformerBody, *, flash: bool) -> None:
        super().__init__()
        shape, (grid,) = network.shape, network.grids
        layers = package.Decoder(
            dim=shape.width,
            depth=shape.layers,
            heads=shape.heads,
            attn_dim_head=shape.head_width,
            attn_flash=flash,
        )
        self.start = grid.codes
        self.decoder = package.TransformerWrapper(
            num_tokens=grid.codes + 1, logits_dim=grid.codes, max_seq_len=grid.length, attn_layers=layers
        )
        self.wrapper = package.AutoregressiveWrapper(self.decoder)

    def forward(self, codes: Tensor) -> Tensor:
        """Mean nats a code of grids int64 [B, side, side]."""
        logits = self.logits(codes)
        return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

    def logits(self, codes: Tensor) -> Tensor:
        """[B, T, K] of grids int64 [B, side, side]."""
        logits: Tensor = self.decoder(F.pad(codes.flatten(1), (1, -1), value=self.start))
        return logits

    def generate(self, batch: int, length: int, **options: Any) -> Tensor:
        """Codes int64 [B, length], drawn by its own loop with its own cache."""
        start = torch.full((batch, 1), self.start)
        codes: Tensor = self.wrapper.generate(start, length, **options)
        return codes

    @torch.no_grad()
    def take(self, network: TransformerBody) -> None:
        """Take over the weights, and leave out of `network` what the peer does not have: the code above, and the class
        everywhere.
        """
        network.above[0].get_parameter("weight").zero_()
        network.class_everywhere.weight.zero_()
        weights = dict(self._from(network))
        for name, norm in self.named_modules():
            if f"{name}.gamma" in weights:  # what its norms keep is the scale less an offset
                weights[f"{name}.gamma"] = weights[f"{name}.gamma"] - float(norm.unit_offset)
        self.load_state_dict(weights, strict=False)  # its wrapper has the same weights under other names

    def _from(self, network: TransformerBody) -> Iterator[tuple[str, Tensor]]:
        """Names of the peer's weights, and ours."""
        tokens = torch.cat([network.tokens[0].get_parameter("weight"), network.class_token.weight[network.no_class :]])
        yield "decoder.token_emb.emb.weight", tokens
        yield "decoder.pos_emb.emb.weight", network.positions[0] / self.decoder.pos_emb.scale
        yield "decoder.to_logits.weight", network.heads[0].get_parameter("weight")
        yield "decoder.attn_layers.final_norm.gamma", network.norm.get_parameter("weight")
        for number, block in enumerate(network.blocks):
            assert isinstance(block, Block)
            front, back = (f"decoder.attn_layers.layers.{2 * number + part}" for part in (0, 1))
            names = ("to_q", "to_k", "to_v")
            for name, weight in zip(names, block.query_key_value.weight.split(block.shape.projections), strict=True):
                yield f"{front}.1.{name}.weight", weight
            yield f"{front}.0.0.gamma", block.norm_attention.get_parameter("weight")
            yield f"{front}.1.to_out.weight", block.project.weight
            yield f"{back}.0.0.gamma", block.norm_feed.get_parameter("weight")
            for mine, theirs in (("0", "0.0"), ("2", "2")):
                for leaf in ("weight", "bias"):
                    yield f"{back}.1.ff.{theirs}.{leaf}", block.feed.get_parameter(f"{mine}.{leaf}")


class XTrainer:
    """Trains it with fused AdamW, and clips as ours does.

    Args:
        network: to be trained.
        rate: learning rate.
        half: whether under bf16 autocast.
    """

    def __init__(self, network: XTransformers, rate: float, *, half: bool) -> None:
        self.network, self._half = network, half
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)

    def step(self, codes: Tensor) -> Tensor:
        """One step on grids int64 [B, side, side]; the loss."""
        with torch.autocast(codes.device.type, torch.bfloat16, enabled=self._half):
            loss: Tensor = self.network(codes)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self._optimizer.step()
        return loss.detach()
