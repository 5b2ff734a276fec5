"""What every test stands on: one thread per process, no hub, no progress bars."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

torch.set_num_threads(1)  # ranks are forked from this process, and its thread pools would not come along
transformers.utils.logging.disable_progress_bar()
