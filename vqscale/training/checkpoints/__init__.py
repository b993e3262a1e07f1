"""Saving and loading a training: pieces of tensors through torch.distributed.checkpoint, without its pickles.

`keeper.Checkpoints` is what the loop uses, `reader.Checkpoint` what export uses. How a checkpoint lies in storage is in
`vqscale.checkpoint`.
"""
