"""What fp32 means on a GPU."""

from __future__ import annotations

import torch


def exact_fp32() -> None:
    """Let GPUs multiply fp32 in fp32, in this process as a whole; called where a process or a loaded model begins.

    By default torch lets cuDNN round what it convolves to TF32, whose mantissa has 10 bits, three more than that of
    bf16. Then a tokenizer in fp32 would pick other codes on a GPU than on a CPU, and what is compared with fp32 would
    be compared with something else. Who wants fast products has bf16.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
