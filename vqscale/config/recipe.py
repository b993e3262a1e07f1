"""One recipe: every setting of an experiment, typed and documented where it is declared.

The tree is frozen and refuses unknown keys. `vqscale schema` prints it as JSON Schema; the docstring under a
field is its description there.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vqscale.config.classifier import Classifier
from vqscale.config.latents import ContinuousLatents
from vqscale.config.prior import Network, kinds_for, spans
from vqscale.config.resources import Resources
from vqscale.config.section import Fraction, Places, Positive, Section
from vqscale.config.tokenizer_kinds import Tokenizer
from vqscale.config.training import Training
from vqscale.data.manifest import CodeLevel
from vqscale.stages import STAGES, TRAINED


class Clocks(Section):
    """Draw analog clock faces instead of reading a data set; the class label is the hour."""

    train: Positive = 24_000
    """Number of training images."""
    validation: Positive = 1_200
    """Number of held-out images, drawn from another seed."""
    shards: Positive = 24
    """Number of training shards."""


class Remote(Section):
    """How shards are read that are not on a local disk (s3://, gs://, hf://, https://, ...)."""

    timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds after which one request is given up and made again."""
    retries: Annotated[int, Field(ge=0)] = 8
    """Failures in a row, without a byte of progress, after which reading a shard fails."""
    block_mb: Annotated[float, Field(gt=0)] = 8.0
    """Largest range that one request asks for, in MiB."""
    connections: Positive = 4
    """Ranges of one shard that are read at the same time."""
    cache: str = ""
    """Folder on a local disk for remote shards, kept by content; empty keeps them in memory while they are read."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Size of the cache in GiB; the shards that were used least recently leave it."""


class Data(Section):
    """What the models are trained on: WebDataset shards with a manifest, or generated clock faces."""

    image_size: Positive
    """Side of the square images in pixels. Stored images of another size are cropped and resized to it."""
    train: Places = ""
    """Training shards: a folder with a `manifest.json`, a manifest, a pattern such as `s3://bucket/train-{000..099}.tar`,
    or a list of these. Empty when `clocks` is set."""
    validation: Places = ""
    """Held-out shards, named like `train`; empty when `clocks` is set."""
    codes: str = ""
    """Folder or URL with code shards in `train` and `validation`, as `vqscale codes pull` leaves them. The prior is
    trained on them; the recipe has no other stage then, and needs no images."""
    clocks: Clocks | None = None
    """Generate the data set (stages `generate` and `pack`) in the run directory."""
    streams: Positive = 12
    """Canonical streams of the data order. Ranks must divide it, and there must be as many shards or more."""
    packet: Positive = 16
    """Samples that are read together from one stream; the global batch is a multiple of packet times ranks."""
    shuffle: Positive = 4_096
    """Shuffle radius in samples: whole shards are grouped until a group holds this many, then permuted."""
    threads: Positive = 1
    """Decoding threads of each rank."""
    decoder: Literal["cpu", "cuda"] = "cpu"
    """Where JPEGs are decoded. `cuda` needs a GPU and torchvision; it pays where images are large and cores are few."""
    openers: Positive = 2
    """Groups of shards that each rank opens at the same time, ahead of their use."""
    ahead_mb: Annotated[float, Field(ge=0)] = 1024.0
    """MiB of shards that each rank may hold open before they are needed; remote ones without a cache lie in memory."""
    remote: Remote = Remote()
    """How shards are read that are not on a local disk."""
    flip: bool = False
    """Mirror training images horizontally with probability one half (a function of seed and position)."""
    error_budget: Fraction = 0.001
    """Largest share of unreadable samples that a run may replace before it stops."""

    def code_shards(self, split: str) -> str:
        """Where `codes` has the shards of a split."""
        return f"{self.codes.rstrip('/')}/{split}"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.clocks and (self.train or self.validation):
            raise ValueError("has both `clocks` and shards; remove `clocks`, or `train` and `validation`")
        if self.codes and (self.clocks or self.train or self.validation):
            raise ValueError("has both `codes` and images; remove `codes`, or `train`, `validation` and `clocks`")
        if not (self.codes or self.clocks or (self.train and self.validation)):
            raise ValueError("names no data: set `train` and `validation`, or `clocks`, or `codes`")
        return self


class Extract(Section):
    """The data set as shards of code grids."""

    batch: Positive = 256
    """Images that are encoded at once on each rank."""
    block: Positive = 512
    """Samples of one block inside a code shard."""
    crops: Positive = 1
    """Squares that are cut from each training image, each a sample of its own: the centre square, then random ones of
    0.8 of its side or more, whose keys end in `~crop1`, `~crop2`, ... Needs images larger than `data.image_size`."""
    flips: bool = False
    """Extract each training image a second time, mirrored horizontally, as a sample of its own whose key ends in
    `~flip`."""


class Prior(Section):
    """Networks over the codes, the coarsest level first."""

    networks: Annotated[tuple[Network, ...], Field(min_length=1)]
    """From the coarsest level to the finest: one network for all, or several that share the levels, each conditioned on
    the coarser levels too. They are trained together."""
    class_dropout: Fraction = 0.1
    """Share of samples trained without their class, which classifier-free guidance needs (Ho & Salimans 2022)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target in training that is spread evenly over all codes (Szegedy et al. 2016, section 7)."""
    training: Training
    """Optimisation."""

    @model_validator(mode="after")
    def _muon_has_matrices(self) -> Self:
        kinds = {network.kind for network in self.networks}
        if self.training.optimizer == "muon" and not any(network.matrices for network in self.networks):
            raise ValueError(
                f"training.optimizer muon is for hidden matrices, which no network of kind {', '.join(sorted(kinds))} "
                f"has; use adamw"
            )
        return self


class Sample(Section):
    """Images drawn from the prior."""

    per_class: Positive = 16
    """Images drawn for each class, unless `count` is set."""
    count: Positive | None = None
    """Images drawn in all; the classes take turns, so that image i is of class i modulo their number."""
    classes: tuple[int | str, ...] = ()
    """Classes to draw, by name or index; empty draws all."""
    output: Literal["png", "webdataset", "npz"] = "png"
    """What is written: a PNG file an image, WebDataset shards that can be trained on, or one `samples.npz` as ADM's
    evaluation reads it (Dhariwal & Nichol 2021)."""
    batch: Positive = 256
    """Images that are drawn at once on each rank; on a GPU fewer where its memory does not hold so many."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softmax temperature."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw among the k likeliest codes only; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: the smallest set of codes that holds this probability."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance scale; 1 is none."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the scale rises from 1 at a network's first code, or pass, to `guidance` at its last; `constant` has it
    everywhere."""
    seed: int = 0
    """Image i depends on (this seed, i) and its class alone, not on the batch or the number of ranks."""


class Evaluate(Section):
    """What the report measures."""

    batch: Positive = 256
    """Images that are evaluated at once on each rank."""
    likelihood: Literal["logistic", "gaussian"] = "logistic"
    """Distribution of a pixel around its reconstruction, cut into the 256 grey levels; its scales, one a colour, are
    fitted to training images."""
    lpips: str | Annotated[tuple[str, ...], Field(min_length=1)] = ""
    """Weights of LPIPS, as for `tokenizer.losses.perceptual.weights`; empty leaves LPIPS out."""
    features: str = ""
    """File or URL of a scripted network whose features FID, Inception Score, precision and recall are made of, such as
    NVIDIA's `inception-2015-12-05.pt`; empty leaves them out. A script is a program: take it from whom you trust."""
    reference: Literal["train", "validation"] = "train"
    """Images that drawn ones are compared with."""
    reference_images: Positive = 50_000
    """The most of them that are taken, from the first on."""
    compared_images: Annotated[int, Field(ge=4)] = 10_000
    """Images of each set that precision and recall are over, the first ones: they compare all with all."""
    classifier: Classifier | None = None
    """The classification accuracy score, which trains classifiers; null leaves it out, `{}` has all defaults."""
    latents: ContinuousLatents = ContinuousLatents()
    """What is estimated of continuous latents."""

    @property
    def lpips_paths(self) -> tuple[str, ...]:
        """The files of `lpips`."""
        return (self.lpips,) if isinstance(self.lpips, str) else self.lpips


class Recipe(Section):
    """A whole experiment."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the experiment; runs are called name-date-time."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything: data order, initialisation, restarts, dropout."""
    data: Data
    """Images."""
    tokenizer: Tokenizer
    """Stage one."""
    extract: Extract = Extract()
    """Images to codes."""
    prior: Prior
    """Stage two."""
    sample: Sample = Sample()
    """Codes to new images."""
    evaluate: Evaluate = Evaluate()
    """Report."""
    resources: Resources = Resources()
    """Processes and devices."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages that this recipe runs; shards that exist already are neither generated nor packed."""
        if self.data.codes:
            return ("prior",)
        return STAGES if self.data.clocks else STAGES[2:]

    @property
    def levels(self) -> tuple[CodeLevel, ...]:
        """The tokenizer's latents of one image, from the finest level to the coarsest."""
        return self.tokenizer.levels_of(self.data.image_size)

    @property
    def dimensions(self) -> int:
        """Values of an image, over which likelihoods are taken."""
        return self.tokenizer.colours * self.data.image_size**2

    @model_validator(mode="after")
    def _images_can_be_encoded(self) -> Self:
        self.tokenizer.check_images(self.data.image_size)
        return self

    @model_validator(mode="after")
    def _networks_share_the_levels(self) -> Self:
        spans(self.prior.networks, len(self.levels))
        return self

    @model_validator(mode="after")
    def _networks_model_such_latents(self) -> Self:
        continuous, ordered = self.levels[0].continuous, self.tokenizer.ordered
        for number, network in enumerate(self.prior.networks):
            if not network.models(continuous=continuous, ordered=ordered):
                latents = "continuous latents" if continuous else "codes"
                latents += " without an order" if network.ordered and not continuous else ""
                fitting = kinds_for(continuous=continuous, ordered=ordered)
                raise ValueError(
                    f"prior.networks.{number}.kind {network.kind} does not model {latents}, which tokenizer.kind "
                    f"{self.tokenizer.kind} has; use {', '.join(fitting)}"
                )
        return self

    @model_validator(mode="after")
    def _strategy_can(self) -> Self:
        for stage in TRAINED:
            training: Training = getattr(self, stage).training
            strategy, key = self.resources.of(stage).strategy, self.resources.key(stage, "strategy")
            if training.optimizer == "muon" and strategy != "ddp":
                raise ValueError(
                    f"{stage}.training.optimizer muon orthogonalises whole matrices, which {key} "
                    f"{strategy} cuts; use adamw, or ddp"
                )
            if training.compile and strategy == "zero3":
                raise ValueError(
                    f"{stage}.training.compile does not go with {key} zero3, which gathers weights in "
                    f"hooks of every layer; use fsdp2"
                )
        return self

    @model_validator(mode="after")
    def _crops_have_room(self) -> Self:
        if self.extract.crops > 1:
            if self.data.clocks:
                raise ValueError("extract.crops: clocks are drawn at data.image_size, with no room for crops; use 1")
            if self.data.decoder == "cuda":
                raise ValueError("extract.crops are cut on the CPU, data.decoder is cuda; use cpu")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        for stage in TRAINED:
            self._check_batches(stage)
        return self

    def _check_batches(self, stage: str) -> None:
        """Streams and batches of a training stage have to be shared by its own ranks."""
        ranks, packet = self.resources.of(stage).processes, self.data.packet
        key, training = f"{self.resources.key(stage, 'processes')} {ranks}", getattr(self, stage).training
        if self.data.streams % ranks:
            raise ValueError(
                f"data.streams {self.data.streams} is not divisible by {key}; use a number of streams that is"
            )
        batch = training.global_batch
        if batch % (ranks * packet):
            raise ValueError(
                f"{stage}.training.global_batch {batch} is not divisible by {key} × data.packet {packet}; "
                f"use a multiple of {ranks * packet}"
            )
        share, micro = batch // ranks, training.micro_batch
        if micro and share % micro:
            fitting = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
            raise ValueError(
                f"{stage}.training.micro_batch {micro} does not divide the {share} samples of a rank "
                f"(global_batch {batch} over {ranks} processes); use one of {fitting}"
            )
