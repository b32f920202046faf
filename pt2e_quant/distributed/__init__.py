"""Calibrating and training in several processes, on torch.distributed: `torchrun --nproc-per-node 2 calibrate.py`.

    merge_ranks(prepared)     after calibration: every process has what the observers of all saw
    synchronize(prepared)     before training: observers see the batches of all processes, batch norms agree

Before this: `pt2e` prepares the model, in each process alike, and the user calls torch.distributed.init_process_group.
"""

from .calibrate import merge_ranks
from .train import synchronize

__all__ = ["merge_ranks", "synchronize"]
