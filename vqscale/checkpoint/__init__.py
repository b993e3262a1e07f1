"""What a checkpoint is in storage: manifest, commit, search, retention. No torch: the launcher uses it too.

    CHECKPOINTS/STAGE/step-00000250/
      rank-00000.safetensors   what rank 0 wrote: each piece of a tensor flat, under NAME:START
      rank-00001.safetensors   ...
      state.json               step, seed, data position, schedule
      manifest.json            size and sha256 of each file above, and where each tensor is; its presence is the commit

Nothing here is a pickle, so loading runs no code. Tensors are put in and taken out in `vqscale.training.checkpoints`.
"""
