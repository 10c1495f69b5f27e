"""Which vector instructions this processor has, by /proc/cpuinfo and the libraries' own switches. Imports no torch.

Kernels ask here before they are chosen: torch's private checks name what the hardware has even where a switch has
turned it off, and oneDNN raises on what is missing. What is not known counts as missing.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

CPUINFO = Path("/proc/cpuinfo")

Feature = Literal["avx2", "avx512", "avx512_bf16", "avx_ne_convert", "amx_bf16", "arm_bf16"]

_NAMED_AS_FLAGS: tuple[Feature, ...] = ("avx512_bf16", "avx_ne_convert", "amx_bf16")
_AVX2 = frozenset[Feature]({"avx2", "avx_ne_convert"})
_AVX512 = frozenset[Feature]({*_AVX2, "avx512"})
_AVX512_BF16 = frozenset[Feature]({*_AVX512, "avx512_bf16"})
_AVX512_FLAGS = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}

SWITCHES: Mapping[str, Mapping[str, frozenset[Feature]]] = {
    # ATen's own kernels; any other value leaves them alone.
    "ATEN_CPU_CAPABILITY": {"default": frozenset(), "avx2": _AVX2},
    # oneDNN's documented values, up to those that turn nothing off that is asked for here.
    "ONEDNN_MAX_CPU_ISA": {
        "SSE41": frozenset(),
        "AVX": frozenset(),
        "AVX2": frozenset({"avx2"}),
        "AVX2_VNNI": frozenset({"avx2"}),
        "AVX2_VNNI_2": _AVX2,
        "AVX512_CORE": _AVX512,
        "AVX512_CORE_VNNI": _AVX512,
        "AVX512_CORE_BF16": _AVX512_BF16,
        "AVX512_CORE_FP16": _AVX512_BF16,
        "AVX10_1_512": _AVX512_BF16,
    },
}
"""What each value of a switch leaves on. A switch of one library counts for all: kernels of both are used together.
MKL's and FBGEMM's switches are not read, because nothing here depends on their instructions."""


@dataclass(frozen=True, slots=True)
class Processor:
    """One kind of processor.

    Attributes:
        name: as the processor calls itself.
        features: what it has and no switch has turned off.
        switches: `NAME=value` of each environment variable that turned something off.
    """

    name: str
    features: frozenset[Feature]
    switches: tuple[str, ...] = ()

    @property
    def avx512(self) -> bool:
        """AVX-512 with what ATen and oneDNN mean by it (F, BW, VL, DQ)."""
        return "avx512" in self.features

    @property
    def converts_bf16(self) -> bool:
        """Whether oneDNN takes bf16 matrices at all, with instructions for the products or without."""
        return not self.features.isdisjoint({"avx512", "avx_ne_convert", "arm_bf16"})

    @property
    def multiplies_bf16(self) -> bool:
        """Whether there are instructions for products of bf16 (AVX512_BF16, AMX)."""
        return self.avx512 and not self.features.isdisjoint({"avx512_bf16", "amx_bf16"})

    @property
    def vectors(self) -> str:
        """What its kernels are, in words."""
        if self.multiplies_bf16:
            return "AVX-512 with bf16 products"
        if self.avx512:
            return "AVX-512 without bf16 products"
        return "AVX2 only" if "avx2" in self.features else "no AVX2"

    def __str__(self) -> str:
        held = f", by {' '.join(self.switches)}" if self.switches else ""
        return f"{self.name}: {self.vectors}{held}"


@cache
def this_processor() -> Processor:
    """The processor of this machine, as it was when first asked: libraries read their switches once, too."""
    try:
        cpuinfo = CPUINFO.read_text()
    except OSError:
        cpuinfo = ""
    return read_processor(cpuinfo, os.environ)


def read_processor(cpuinfo: str, environ: Mapping[str, str]) -> Processor:
    """The processor that a /proc/cpuinfo describes, less what the environment turns off."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            # Of several processors the first speaks for all.
            fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    features: set[Feature] = set()
    if {"avx2", "fma"} <= flags:
        features.add("avx2")
    if features and flags >= _AVX512_FLAGS:
        features.add("avx512")
    features |= {feature for feature in _NAMED_AS_FLAGS if feature in flags}
    if "bf16" in fields.get("Features", "").split():
        features.add("arm_bf16")
    left, switches = frozenset(features), []
    for name, values in SWITCHES.items():
        # oneDNN reads its values in any case, ATen in lower case only.
        value = environ.get(name, "")
        allowed = values.get(value.upper() if name.startswith("ONEDNN") else value)
        if allowed is not None and not allowed >= features:
            switches.append(f"{name}={value}")
            left &= allowed
    return Processor(fields.get("model name") or platform.processor() or platform.machine(), left, tuple(switches))


if __name__ == "__main__":
    print(this_processor())
