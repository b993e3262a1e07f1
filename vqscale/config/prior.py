"""The parts of a recipe's prior: its networks, one kind a section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from vqscale.config.section import Fraction, Positive, Section


class NetworkSection(Section):
    """What all kinds have in common. The other settings of a kind are the arguments of its network, by name."""

    joint: ClassVar[bool] = False
    """Whether one network of this kind models several levels as one sequence; else each level gets its own."""
    matrices: ClassVar[bool] = False
    """Whether it has hidden matrices, which `optimizer: muon` is for."""
    continuous: ClassVar[bool] = False
    """Whether it models continuous latents; else codes."""
    ordered: ClassVar[bool] = False
    """Whether codes have to be in an order, as the values of pixels are."""
    kind: str
    """Kind of network."""
    levels: Positive | None = None
    """Levels that it models, of those that the networks before it left; left out, one, and for the last network all."""

    @classmethod
    def models(cls, *, continuous: bool, ordered: bool) -> bool:
        """Whether it models such latents: continuous ones, or codes that are in an order or not."""
        return cls.continuous == continuous and cls.ordered <= ordered

    @property
    def sizes(self) -> dict[str, Any]:
        """The settings of the kind alone."""
        return self.model_dump(exclude=set(NetworkSection.model_fields))


SIZES = {
    "S": {"layers": 6, "width": 384, "heads": 6},
    "B": {"layers": 12, "width": 768, "heads": 12},
    "L": {"layers": 24, "width": 1024, "heads": 16},
    "XL": {"layers": 36, "width": 1280, "heads": 20},
    "XXL": {"layers": 48, "width": 1536, "heads": 24},
    "3B": {"layers": 24, "width": 3200, "heads": 32},
}
"""From B on those of LlamaGen (Sun et al. 2024, table 1)."""


class Attending(NetworkSection):
    """What networks of transformer blocks have in common."""

    matrices: ClassVar[bool] = True
    size: Literal["S", "B", "L", "XL", "XXL", "3B"] | None = None
    """Sets `layers`, `width` and `heads`: S 6, 384, 6; B 12, 768, 12; L 24, 1024, 16; XL 36, 1280, 20;
    XXL 48, 1536, 24; 3B 24, 3200, 32."""
    layers: Positive = 4
    """Transformer blocks."""
    width: Positive = 128
    """Model dimension."""
    heads: Positive = 4
    """Attention heads; must divide `width`."""
    dropout: Fraction = 0.0
    """Dropout on the residual branches."""
    key_value_heads: Positive | None = None
    """Heads of keys and values; a group of queries shares each, which makes the cache smaller. Must divide `heads`;
    left out, as many."""
    norm: Literal["layer", "rms"] = "layer"
    """Layer norm without bias, or RMSNorm."""
    feed: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward: GELU as in GPT-2, or SwiGLU."""
    feed_width: Positive | None = None
    """Width inside the feed-forward; left out, 4 times `width`, and 8/3 times for SwiGLU, which has as many weights."""
    positions: Literal["learned", "rotary"] = "learned"
    """A learned vector for each cell, or rotations by row and column and a learned vector for each level."""

    @property
    def sizes(self) -> dict[str, Any]:
        """The settings of the kind, without the name that stands for three of them."""
        return {name: value for name, value in super().sizes.items() if name != "size"}

    @model_validator(mode="before")
    @classmethod
    def _size_stands_for_three(cls, tree: Any) -> Any:
        size = tree.get("size") if isinstance(tree, dict) else None
        if not isinstance(size, str):
            return tree
        meant = SIZES.get(size, {})
        for name, number in meant.items():
            if tree.get(name, number) != number:
                raise ValueError(f"size {size} means {name} {number}, but {name} is {tree[name]}; leave one out")
        return {**tree, **meant}

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}; change one of them")
        if self.key_value_heads and self.heads % self.key_value_heads:
            raise ValueError(f"heads {self.heads} is not divisible by key_value_heads {self.key_value_heads}")
        if self.positions == "rotary" and self.width // self.heads % 4:
            raise ValueError(
                f"positions rotary turns rows and columns in pairs; width {self.width} over heads {self.heads} "
                f"is not divisible by 4"
            )
        return self


class TransformerNetwork(Attending):
    """Decoder-only transformer: all codes of its levels as one sequence, the coarsest level first."""

    joint: ClassVar[bool] = True
    kind: Literal["transformer"] = "transformer"
    """Transformer; the kind that is meant where none is given."""


class PixelCNNNetwork(NetworkSection):
    """Gated PixelCNN (van den Oord et al. 2016b): convolutions over the codes above and to the left."""

    kind: Literal["pixelcnn"]
    """Gated PixelCNN."""
    layers: Positive = 10
    """Gated layers. A cell sees half a kernel further with each."""
    width: Positive = 128
    """Channels."""
    kernel: Literal[3, 5, 7] = 3
    """Side of the kernels, half of which is cut away."""
    dropout: Fraction = 0.0
    """Dropout inside the layers."""


class RecurrentNetwork(NetworkSection):
    """Recurrent network over the codes in raster order: the cost of drawing a code does not depend on its place."""

    kind: Literal["recurrent"]
    """Recurrent network."""
    layers: Positive = 2
    """Recurrent layers."""
    width: Positive = 256
    """Channels, and size of the states."""
    cell: Literal["lstm", "gru"] = "lstm"
    """LSTM, or GRU, which has three quarters of the weights."""
    dropout: Fraction = 0.0
    """Dropout inside the layers."""


class MaskedNetwork(Attending):
    """Masked prediction (MaskGIT, Chang et al. 2022): a grid is drawn in a few passes; its nats are an upper bound."""

    kind: Literal["masked"]
    """Masked prediction."""
    passes: Positive = 8
    """Forwards that a grid is drawn in."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the number of masked codes falls over the passes."""
    choice_temperature: Annotated[float, Field(ge=0)] = 4.5
    """Gumbel noise on the log-probabilities by which codes are kept: it falls linearly, to none in the last pass."""


class BlockwiseNetwork(Attending):
    """Block-autoregressive transformer (Reed et al. 2017): a grid is drawn in a few passes; its nats are exact."""

    kind: Literal["blockwise"]
    """Block-autoregressive transformer."""
    order: Literal["spread", "wave"] = "spread"
    """`spread` draws cells that lie far apart at once, from coarse to fine, in `passes`; `wave` those a knight's move
    apart, from corner to corner in 3 side - 2 passes, so that each knows its neighbours to the left and above."""
    passes: Positive = 8
    """Forwards that a grid is drawn in, of `spread`."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the number of codes that are still to be drawn falls over the passes, of `spread`."""
    window: Literal[3, 5, 7] = 5
    """Side of the square of cells around it that each cell is told directly, as far as they are drawn."""

    @model_validator(mode="after")
    def _a_wave_has_its_passes(self) -> Self:
        for name in ("passes", "schedule"):
            if self.order == "wave" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is for the order spread; the passes of a wave follow from the grid: leave it out"
                )
        return self


class UniformNetwork(NetworkSection):
    """Every code equally likely: nothing is trained. The baseline of the others."""

    kind: Literal["uniform"]
    """Uniform."""


class DequantizedNetwork(NetworkSection):
    """A density over images: RealNVP on the values of pixels with noise in their bins; its nats are an upper bound."""

    ordered: ClassVar[bool] = True
    kind: Literal["dequantized"]
    """RealNVP on dequantized pixels."""
    couplings: Positive = 8
    """Affine couplings."""
    width: Positive = 64
    """Channels of the networks of flow and noise."""
    noise: Literal["uniform", "variational"] = "variational"
    """Uniform in the bins (Theis et al. 2016), or by a flow that is told the image and learned too (Ho et al. 2019)."""
    noise_couplings: Positive = 4
    """Affine couplings of the variational noise."""


class NormalNetwork(NetworkSection):
    """Standard normal latents: nothing is trained. The prior of a plain VAE, and the baseline of the flows."""

    continuous: ClassVar[bool] = True
    kind: Literal["normal"]
    """Standard normal."""


class RealNVPNetwork(NetworkSection):
    """RealNVP (Dinh et al. 2017): affine couplings over continuous latents; density and drawing take one forward."""

    continuous: ClassVar[bool] = True
    kind: Literal["realnvp"]
    """RealNVP."""
    couplings: Positive = 8
    """Affine couplings; 4 of them have met every kind of part (checkerboard and channels, both halves)."""
    width: Positive = 64
    """Channels of their networks."""


class MAFNetwork(NetworkSection):
    """Masked autoregressive flow (Papamakarios et al. 2017): a density of one forward, drawing value by value."""

    continuous: ClassVar[bool] = True
    kind: Literal["maf"]
    """Masked autoregressive flow."""
    maps: Positive = 4
    """Autoregressive maps; every second one reads the values backwards."""
    layers: Positive = 2
    """Gated layers in the network of each map. A cell sees half a kernel further with each."""
    width: Positive = 64
    """Channels of their networks."""
    kernel: Literal[3, 5, 7] = 3
    """Side of their kernels, half of which is cut away."""


class IAFNetwork(NetworkSection):
    """Inverse autoregressive flow (Kingma et al. 2016): drawing takes one forward, a density some rounds of them."""

    continuous: ClassVar[bool] = True
    kind: Literal["iaf"]
    """Inverse autoregressive flow."""
    maps: Positive = 4
    """Autoregressive maps; every second one reads the noise backwards."""
    layers: Positive = 2
    """Gated layers in the network of each map. A cell sees half a kernel further with each."""
    width: Positive = 64
    """Channels of their networks."""
    kernel: Literal[3, 5, 7] = 3
    """Side of their kernels, half of which is cut away."""


class AggregatedNetwork(NetworkSection):
    """The aggregated posterior over some training images: the best prior for them, which overfits."""

    joint: ClassVar[bool] = True
    continuous: ClassVar[bool] = True
    kind: Literal["aggregated"]
    """Aggregated posterior."""
    images: Positive = 1000
    """Training images whose posteriors are kept, the first of the first shards."""


def _kind(value: Any) -> Any:
    """A union over a field would know no default."""
    return value.get("kind", "transformer") if isinstance(value, dict) else getattr(value, "kind", value)


Network = Annotated[
    Annotated[TransformerNetwork, Tag("transformer")]
    | Annotated[PixelCNNNetwork, Tag("pixelcnn")]
    | Annotated[RecurrentNetwork, Tag("recurrent")]
    | Annotated[MaskedNetwork, Tag("masked")]
    | Annotated[BlockwiseNetwork, Tag("blockwise")]
    | Annotated[UniformNetwork, Tag("uniform")]
    | Annotated[DequantizedNetwork, Tag("dequantized")]
    | Annotated[NormalNetwork, Tag("normal")]
    | Annotated[RealNVPNetwork, Tag("realnvp")]
    | Annotated[MAFNetwork, Tag("maf")]
    | Annotated[IAFNetwork, Tag("iaf")]
    | Annotated[AggregatedNetwork, Tag("aggregated")],
    Discriminator(_kind),
]
"""One network of the prior, by its `kind`."""


def kinds_for(*, continuous: bool, ordered: bool) -> list[str]:
    """The kinds of network that model continuous latents, or codes, which may be in an order."""
    tagged = [get_args(each) for each in get_args(get_args(Network)[0])]
    return [tag.tag for section, tag in tagged if section.models(continuous=continuous, ordered=ordered)]


def spans(networks: Sequence[NetworkSection], levels: int) -> list[int]:
    """How many levels each network models, of so many.

    Raises:
        ValueError: they model more or fewer.
    """
    wanted = [network.levels or 1 for network in networks]
    if networks[-1].levels is None:
        wanted[-1] = max(1, levels - sum(wanted[:-1]))
    if sum(wanted) != levels:
        raise ValueError(
            f"prior.networks model {sum(wanted)} levels, the tokenizer has {levels}; "
            f"change prior.networks.*.levels, or the number of networks"
        )
    return wanted
