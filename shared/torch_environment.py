"""What torch reads from the environment. Set it before torch is imported."""

from collections.abc import MutableMapping

THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
"""At the end of a parallel region a thread spins for a tenth of a millisecond and then sleeps (see libgomp's manual).
With sleep at once a decode step takes 50 % longer, because waking a thread takes longer than most parallel regions
last; endless spinning takes cores from other processes."""

GPU_MEMORY = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Every step has another number of tokens. In blocks of fixed size that leaves gaps: after 18 steps on an H200 the
allocator held 11.4 to 12.2 GB for a peak of 7.0 to 7.4 GB, with segments that grow 7.2 to 7.6 GB at the same speed."""

COMPILER = {"TORCHDYNAMO_DISABLE": "1"}
"""Nothing here is compiled by torch, but bitsandbytes decorates a function with `torch.compile` as it is imported, and
that alone loads the compiler: 2.3 of the 9 s of processor time that a worker's imports take."""


def prepare_for_torch(environ: MutableMapping[str, str]) -> None:
    """Set each variable that the environment does not set already."""
    for name, value in (THREADS | GPU_MEMORY | COMPILER).items():
        environ.setdefault(name, value)
