"""Say which GPU is present."""

from __future__ import annotations

import torch


def present() -> tuple[str, tuple[int, int]] | None:
    """Return the name and compute capability of torch's current GPU; None if it sees none."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(), torch.cuda.get_device_capability()
