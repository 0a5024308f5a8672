"""Memory of this process: how much it took at most, and giving back what the allocator keeps.

glibc keeps freed blocks of up to 32 MB for later. Between the many sizes of tensors that a block of a model needs they
never fit again, and the process grows by several MB per block, to gigabytes on a large model, with nothing in use.
"""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

try:
    import resource
except ImportError:  # Windows keeps no such record
    resource = None


def give_back_freed_memory() -> None:
    """Collect garbage and return freed heap to the system; costs milliseconds. Elsewhere than on glibc it only collects."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak resident memory of this process, or of the GPU's allocator when the work ran there; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
