"""How a stage is optimised."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vqscale.config.section import Decay, Fraction, Positive, Section


class Training(Section):
    """How one stage is optimised; the tokenizer and the prior share it."""

    steps: Positive
    """Optimizer steps."""
    global_batch: Positive
    """Samples of one step over all ranks."""
    micro_batch: Positive | None = None
    """Samples of a rank's forward pass; null takes all of its share of `global_batch`. Gradients and codebook
    statistics of a step's micro-batches add up, so that only memory and speed depend on it."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of the transformer's hidden matrices (AdamW keeps the rest)."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from zero."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after the warm-up, down to `final_learning_rate`."""
    final_learning_rate: Fraction = 0.0
    """Learning rate at the last step, as a fraction of the peak (unused by `constant`)."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay on matrices and kernels; biases, norms, embeddings, positions and learned scales are not
    decayed."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Gradient norm is clipped to this; 0 switches clipping off (the norm is still logged)."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """`bf16` runs the networks under autocast; weights, codebooks and the code search stay fp32. `auto` is bf16 on GPUs
    and on processors of this machine that have units for it, else fp32: settled when the run is made, and recorded.
    `fp32` on GPUs is without TF32."""
    checkpoint_activations: bool = False
    """Keep no activations inside encoders, decoders and transformer blocks, and compute them again in the backward."""
    compile: bool = False
    """Compile encoders, decoders and transformer blocks with torch.compile; the code search is left as it is."""
    max_skipped: Annotated[int, Field(ge=0)] = 10
    """Steps in a row that may be skipped because their gradient is not finite, before the run stops."""
    log_every: Positive = 10
    """Steps between two lines of figures in the events and TensorBoard."""
    picture_every: Positive = 250
    """Steps between two sets of pictures in TensorBoard."""
    validate_every: Positive = 250
    """Steps between two passes over held-out data."""
    checkpoint_every: Positive = 250
    """Steps between two checkpoints; the last step always writes one."""
    keep: Positive = 2
    """Checkpoints that are kept; older ones are removed after a newer one is committed."""
    checkpoint_async: bool = True
    """Write checkpoints in the background; training waits only while each rank copies its share into memory."""
    hash_every: Positive = 50
    """Steps between two comparisons of the codebooks' hash across ranks (tokenizer only)."""
