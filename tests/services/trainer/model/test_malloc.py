"""What libraries keep for later."""

import os
from pathlib import Path

import pytest
import torch

from services.trainer.model.malloc import CACHED_KERNELS, limit_kernel_cache, release_free_memory

KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def resident_mb() -> float:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1e3


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")
def test_what_was_freed_below_a_living_block_goes_back() -> None:
    blocks = [torch.ones(16_000) for _ in range(2_000)]
    # The heap cannot end before it.
    last = blocks.pop()
    blocks.clear()
    before = resident_mb()
    release_free_memory()
    assert before - resident_mb() > 60
    assert last.sum() == 16_000


def test_few_kernels_are_kept_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNEL_CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(KERNEL_CACHES[0], "7")
    limit_kernel_cache()
    assert [os.environ[name] for name in KERNEL_CACHES] == ["7", str(CACHED_KERNELS)]
