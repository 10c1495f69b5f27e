"""What a processor has: by its flags, and by the switches that the libraries obey."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.processor import Processor, read_processor, this_processor

ZEN3 = "fma sse4_2 avx f16c avx2 bmi1 bmi2 vaes"
SKYLAKE = f"{ZEN3} avx512f avx512dq avx512cd avx512bw avx512vl"
ZEN4 = f"{SKYLAKE} avx512_bf16 avx512_vnni"
SAPPHIRE_RAPIDS = f"{ZEN4} amx_bf16 amx_tile amx_int8"
SIERRA_FOREST = f"{ZEN3} avx_vnni avx_ne_convert"
ROOT = Path(__file__).parents[2]


def processor(flags: str, **switches: str) -> Processor:
    return read_processor(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\n", switches)


@pytest.mark.parametrize(
    ("flags", "words", "avx512", "converts", "multiplies"),
    [
        ("sse4_2 avx", "no AVX2", False, False, False),
        (ZEN3, "AVX2 only", False, False, False),
        (SIERRA_FOREST, "AVX2 only", False, True, False),
        (SKYLAKE, "AVX-512 without bf16 products", True, True, False),
        (ZEN4, "AVX-512 with bf16 products", True, True, True),
        (SAPPHIRE_RAPIDS, "AVX-512 with bf16 products", True, True, True),
        # Xeon Phi's AVX-512 is not the one that the libraries mean.
        (f"{ZEN3} avx512f avx512cd avx512er", "AVX2 only", False, False, False),
    ],
)
def test_flags(flags: str, words: str, avx512: bool, converts: bool, multiplies: bool) -> None:
    each = processor(flags)
    assert str(each) == f"Some CPU: {words}"
    assert (each.avx512, each.converts_bf16, each.multiplies_bf16) == (avx512, converts, multiplies)


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "AVX2 only"),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "AVX2 only"),
        ({"ONEDNN_MAX_CPU_ISA": "avx2"}, "AVX2 only"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "AVX-512 without bf16 products"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "no AVX2"),
    ],
)
def test_switches_turn_off(switches: dict[str, str], words: str) -> None:
    each = processor(SAPPHIRE_RAPIDS, **switches)
    assert each.vectors == words
    assert not each.multiplies_bf16
    assert set(each.switches) == {f"{name}={value}" for name, value in switches.items()}
    assert all(switch in str(each) for switch in each.switches)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        # Values that the libraries ignore, and those that turn nothing off.
        {"ATEN_CPU_CAPABILITY": "AVX2", "ONEDNN_MAX_CPU_ISA": "none"},
        {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "ALL"},
        {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"},
    ],
)
def test_other_values_change_nothing(switches: dict[str, str]) -> None:
    assert processor(ZEN4, **switches) == processor(ZEN4)


def test_a_switch_adds_nothing() -> None:
    assert processor(ZEN3, ONEDNN_MAX_CPU_ISA="AVX512_CORE_AMX", ATEN_CPU_CAPABILITY="avx512") == processor(ZEN3)


def test_arm_and_nothing_readable() -> None:
    arm = read_processor("processor : 0\nFeatures : fp asimd bf16 i8mm\n", {})
    assert arm.converts_bf16
    assert not arm.avx512
    assert read_processor("", {}).features == frozenset()


@pytest.mark.slow
def test_it_agrees_with_the_libraries_under_every_switch() -> None:
    """A no where a kernel would work is only slow; a yes where it raises would be a crash."""
    code = """
import torch
from shared.processor import this_processor
ours = this_processor()
assert ours.avx512 <= (torch.backends.cpu.get_cpu_capability() == "AVX512"), ours
try:
    torch.ops.mkldnn._reorder_linear_weight(torch.ones(16, 16).bfloat16(), None)
except RuntimeError:
    assert not ours.converts_bf16, ours
print(ours.avx512, ours.converts_bf16)
"""
    bare = {key: value for key, value in os.environ.items() if key not in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")}
    seen = {}
    for name, switches in {
        "none": {},
        "ATen": {"ATEN_CPU_CAPABILITY": "avx2"},
        "oneDNN": {"ONEDNN_MAX_CPU_ISA": "avx2"},
    }.items():
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=bare | switches, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        seen[name] = done.stdout.split()
    assert seen["ATen"][0] == "False"
    assert seen["oneDNN"] == ["False", "False"]


def test_this_one_is_read_once() -> None:
    assert this_processor() is this_processor()
    assert this_processor().name
