"""How much memory this process can still get: from the machine, its container (cgroup v2) or the GPU."""

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from shared.bases.device import free_gpu_bytes

FreeMemory = Callable[[torch.device], int]
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device: of the machine and its container, or of the GPU."""
    if device.type == "cuda":
        return free_gpu_bytes(device)
    return min(psutil.virtual_memory().available, cgroup_bytes(CGROUP))


def cgroup_bytes(group: Path) -> int:
    """Bytes left of a control group's memory (cgroup v2), file cache counted as free; 2^62 without a limit."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - int(used) + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        # No such group, or "max".
        return 1 << 62
