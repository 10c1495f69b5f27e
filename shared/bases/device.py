"""Which device a process computes on: `TUNESMITH_DEVICE`, and what to say if the GPU that it names is not there."""

import re
from pathlib import Path

import torch

from shared.errors import TunesmithError
from shared.jobs.spec import DeviceKind
from shared.logs import get_logger
from shared.settings import DeviceChoice

DRIVER = Path("/proc/driver/nvidia/version")


def choose_device(wanted: DeviceChoice = "auto", driver_file: Path = DRIVER) -> torch.device:
    """The device that was asked for; for `auto` the GPU that torch sees, else the CPU.

    Raises:
        TunesmithError: code `no_gpu`; a GPU was asked for, and torch sees none.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if wanted == "cuda":
        raise TunesmithError(f"TUNESMITH_DEVICE is cuda, and {why_no_gpu(driver_file)}", code="no_gpu")
    if driver_version(driver_file):
        get_logger("device").warning("computing on the CPU beside a GPU", reason=why_no_gpu(driver_file))
    return torch.device("cpu")


def take_share(device: torch.device, share: float) -> None:
    """Have this process take no more than a share of a GPU's memory; beyond it torch says that it is out of memory.

    What the CUDA context and its libraries take, some hundred MB a process, is not counted.
    """
    if device.type == "cuda" and share < 1:
        torch.cuda.set_per_process_memory_fraction(share)


def free_gpu_bytes(device: torch.device) -> int:
    """Bytes of a GPU that this process can still allocate, its share of the memory minded."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    of_share = int(total * torch.cuda.get_per_process_memory_fraction()) - reserved
    # What torch's allocator has reserved and does not use is free, too.
    return max(0, min(int(free), of_share)) + reserved - torch.cuda.memory_allocated(device)


def device_kind(device: torch.device) -> DeviceKind:
    """A device as reports and events name it."""
    return "cuda" if device.type == "cuda" else "cpu"


def why_no_gpu(driver_file: Path = DRIVER) -> str:
    """What is known about it, as part of a sentence."""
    driver = driver_version(driver_file)
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build for CPUs: install one for CUDA (make setup without TORCH_INDEX)"
    built = f"torch {torch.__version__} (built for CUDA {torch.version.cuda}) sees no GPU"
    if driver is None:
        return f"{built}: there is no NVIDIA driver here, or the container was given no GPU"
    return (
        f"{built} with NVIDIA driver {driver}: the driver is too old for this build (a newer driver, or make setup "
        "TORCH_INDEX=https://download.pytorch.org/whl/cu126), or CUDA_VISIBLE_DEVICES hides all of them"
    )


def driver_version(driver_file: Path = DRIVER) -> str | None:
    """The NVIDIA kernel driver's version, as `580.95.05`; None without one."""
    try:
        found = re.search(r"Kernel Module\b.*?(\d+\.\d+(?:\.\d+)*)", driver_file.read_text())
    except OSError:
        return None
    return found[1] if found else "of unknown version"
