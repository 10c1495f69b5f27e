import os
import subprocess
import sys

from shared.torch_environment import COMPILER, GPU_MEMORY, THREADS, prepare_for_torch

VARIABLES = THREADS | GPU_MEMORY | COMPILER


def test_what_was_set_stays() -> None:
    own = {"GOMP_SPINCOUNT": "7", "PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    environ = dict(own)
    prepare_for_torch(environ)
    assert environ == VARIABLES | own


def test_it_is_heard_of_when_torch_is_imported_afterwards() -> None:
    code = (
        "import os, sys; from shared.torch_environment import prepare_for_torch; prepare_for_torch(os.environ); "
        "import bitsandbytes; print('torch._inductor.compile_fx' in sys.modules)"
    )
    environ = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environ | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
    assert f"GOMP_SPINCOUNT = '{THREADS['GOMP_SPINCOUNT']}'" in done.stderr
    assert done.stdout.strip() == "False"
