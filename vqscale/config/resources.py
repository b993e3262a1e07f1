"""What the stages of a recipe run on: processes, threads, devices, and where one stage differs from the others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vqscale.config.section import Positive, Section

Device = Literal["auto", "cpu", "cuda"]
Strategy = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]


class StageResources(Section):
    """What one stage runs on where that differs from the other stages; nothing takes over what `resources` says."""

    processes: Positive | None = None
    """Processes (ranks) of this stage; of each task, where it is an array."""
    threads: Annotated[int, Field(ge=0)] | None = None
    """CPU threads of each process; 0 shares the machine's cores evenly."""
    device: Device | None = None
    """As `resources.device`."""
    strategy: Strategy | None = None
    """As `resources.strategy`."""
    max_restarts: Annotated[int, Field(ge=0)] | None = None
    """As `resources.max_restarts`."""
    hang_s: Positive | None = None
    """As `resources.hang_s`."""
    timeout_s: Positive | None = None
    """As `resources.timeout_s`."""


class ArrayResources(StageResources):
    """The same of a stage whose work falls into independent parts."""

    array: Annotated[int, Field(ge=1, le=1000)] = 1
    """Tasks that share the work, each with processes of its own: under Slurm an array of jobs, elsewhere one after the
    other. What they make together does not depend on their number."""


class Stages(Section):
    """Resources of single stages."""

    generate: StageResources | None = None
    """Of the stage that draws clock faces."""
    pack: StageResources | None = None
    """Of the stage that packs them."""
    tokenizer: StageResources | None = None
    """Of the tokenizer's training."""
    extract: ArrayResources | None = None
    """Of the extraction; its tasks share the image shards."""
    prior: StageResources | None = None
    """Of the prior's training."""
    sample: ArrayResources | None = None
    """Of the sampling; its tasks share the images."""
    evaluate: StageResources | None = None
    """Of the evaluation."""


class Resources(Section):
    """What each stage runs on."""

    processes: Positive = 1
    """Processes (ranks) a stage."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of each process; 0 shares the machine's cores evenly."""
    device: Device = "auto"
    """`auto` takes CUDA where torch finds a GPU for every process, else the CPU; what was taken is printed."""
    strategy: Strategy = "ddp"
    """How a model is spread over the ranks. `ddp` keeps it whole on each; `zero1` shards the optimizer's moments,
    `zero2` the gradients too, `zero3` and `fsdp2` the weights too. ZeRO needs the extra `deepspeed`."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often the elastic agent restarts failed processes of a stage; they resume from the last checkpoint."""
    hang_s: Positive = 300
    """Longest silence of a rank in training, in seconds (four times that in the first step). Then all ranks leave
    their stacks in the run directory and the stage ends, to be started again where `max_restarts` allows."""
    checkpoints: str = ""
    """Folder or URL (`s3://bucket/folder`) for checkpoints, one folder a run in it; empty keeps them in the run."""
    timeout_s: Positive = 600
    """Longest wait in a collective, in seconds, before a stage is stopped."""
    stages: Stages = Stages()
    """Stages that run on something else than the others."""

    def array_of(self, stage: str) -> int:
        """Tasks that share a stage's work; 1 where it is no array."""
        own = self._own(stage)
        return own.array if isinstance(own, ArrayResources) else 1

    def of(self, stage: str) -> Resources:
        """What one stage runs on: its own settings above the common ones."""
        own = self._own(stage)
        changed = {name: value for name, value in own if value is not None and name != "array"} if own else {}
        return self.model_copy(update=changed)

    def key(self, stage: str, name: str) -> str:
        """The dotted name of the setting that holds for a stage, for messages."""
        own = self._own(stage)
        return f"resources.stages.{stage}.{name}" if own and getattr(own, name) is not None else f"resources.{name}"

    def _own(self, stage: str) -> StageResources | None:
        own: StageResources | None = getattr(self.stages, stage)
        return own
