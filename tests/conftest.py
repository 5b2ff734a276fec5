"""What every test stands on: one thread per process, no hub, no progress bars."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# torch asks the name server for the name of what it connects to, 127.0.0.1 too, and a lost question costs 5 s
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")

import torch
import transformers

torch.set_num_threads(1)  # ranks are forked from this process, and its thread pools would not come along
transformers.utils.logging.disable_progress_bar()
gc.freeze()  # torch and transformers stay: no collection has to go through all of them, here or on a rank
