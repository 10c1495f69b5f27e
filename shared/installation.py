"""`python -m shared.installation CHECK`: one look at what an installation needs, as one line; exit 1 if it is not so.

CHECK is `catalogue`, `schema` or `torch`, which `tunesmith doctor` asks each in a process of its own, or `worker`: what
a worker needs to claim jobs, for the health check of its container.
"""

import os
import sys
from collections.abc import Callable

from shared.bases.catalogue import load_catalogue
from shared.errors import TunesmithError
from shared.settings import Settings, read_settings
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import check_schema
from shared.storage.installation_id import require_own_folder_at
from shared.storage.manifests import is_published


def catalogue(settings: Settings) -> str:
    store = LocalArtifactStore(settings.artifacts_root)
    states = {True: "prepared", False: "prepared when first used"}
    bases = load_catalogue(settings.catalogue).bases
    return ", ".join(f"{base.id} ({states[is_published(store.base(base.id), 'base')]})" for base in bases)


def schema(settings: Settings) -> str:
    check_schema(settings.sql_url)
    return "as this version needs it"


def torch(settings: Settings) -> str:
    import bitsandbytes
    import torch

    layer = bitsandbytes.nn.Linear8bitLt(8, 8, has_fp16_weights=False)
    if not layer(torch.ones(1, 8)).isfinite().all():
        raise TunesmithError("bitsandbytes computes nonsense")
    cuda = torch.cuda.is_available()
    if cuda:
        # Its GPU library is another one, chosen by the version of CUDA.
        weight = torch.randn(64, 64, device="cuda")
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        if not torch.allclose(bitsandbytes.functional.dequantize_4bit(packed, state), weight, atol=1):
            raise TunesmithError("bitsandbytes computes nonsense on the GPU")
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return f"{torch.__version__} on {device}; bitsandbytes {bitsandbytes.__version__}"


def worker(settings: Settings) -> str:
    check_schema(settings.sql_url)
    store = LocalArtifactStore(settings.artifacts_root)
    require_own_folder_at(settings.sql_url, store)
    if not os.access(store.root, os.W_OK):
        raise TunesmithError(f"{store.root} cannot be written")
    return "database and artifacts folder answer"


CHECKS: dict[str, Callable[[Settings], str]] = {
    "catalogue": catalogue,
    "schema": schema,
    "torch": torch,
    "worker": worker,
}


def main() -> int:
    try:
        print(CHECKS[sys.argv[1]](read_settings(Settings)))
    except Exception as error:
        print(f"{getattr(error, 'message', error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
