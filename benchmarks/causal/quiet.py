"""Libraries that keep what they tell of their own to themselves: a table is made of answers."""

from __future__ import annotations

import logging
import os

import transformers


def be_quiet() -> None:
    """Silences warnings, progress bars and what is logged, in this process and in those forked from it."""
    os.environ["PYTHONWARNINGS"] = "ignore"
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("parallel_plans").setLevel(logging.ERROR)
