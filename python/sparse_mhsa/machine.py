"""The machine and the versions that a measurement belongs to."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ._core import __version__


def environment() -> dict[str, Any]:
    """Versions, processor, cores and threads, for the head of a report."""
    return {
        "sparse_mhsa": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
