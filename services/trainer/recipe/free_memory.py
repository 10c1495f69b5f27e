"""How much memory this process can still get: from the machine, its container (cgroup v2) or the GPU."""

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

FreeMemory = Callable[[torch.device], int]
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device: of the machine and its container, or of the GPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        of_share = int(total * torch.cuda.get_per_process_memory_fraction()) - reserved
        # What torch's allocator has reserved and does not use is free, too.
        return max(0, min(int(free), of_share)) + reserved - torch.cuda.memory_allocated(device)
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
