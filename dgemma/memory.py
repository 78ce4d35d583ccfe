"""What malloc does with freed memory."""

import ctypes
import os
import sys


def keep_freed_memory() -> None:
    """Lets glibc's malloc keep what is freed: faulting it in again takes up to a third of a step on a CPU.

    This holds for the whole process. It is not done if the environment already tells malloc something (MALLOC_…).
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    for name, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 100 << 20)):
        if mallopt:
            mallopt(name, value)
