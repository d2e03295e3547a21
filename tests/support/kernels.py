"""Where tests of Triton programs run: on CUDA, or, with ``TRITON_INTERPRET=1``, on a processor."""

import pytest
import torch

from sinkbench.compilers import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # Triton's interpreter cuts bfloat16 off, and does not round
where_kernels_run = [] if INTERPRETED else [pytest.mark.cuda]
