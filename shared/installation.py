"""`python -m shared.installation CHECK`: one look at what an installation needs, as one line; exit 1 if it is not so.

CHECK is `catalogue`, `schema` or `torch`, which `tunesmith doctor` asks each in a process of its own; `device`, which a
worker on a GPU asks before it starts; or `worker`: what it needs to claim jobs, for the health check of its container.
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
    from shared.bases.device import choose_device

    if choose_device(settings.device).type == "cuda":
        # Its GPU library is another one, chosen by the version of CUDA.
        weight = torch.randn(64, 64, device="cuda")
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        if not torch.allclose(bitsandbytes.functional.dequantize_4bit(packed, state), weight, atol=1):
            raise TunesmithError("bitsandbytes computes nonsense on the GPU")
    return f"{torch.__version__} on {device(settings)}; bitsandbytes {bitsandbytes.__version__}"


def device(settings: Settings) -> str:
    import torch

    from shared.bases.device import choose_device, driver_version, why_no_gpu

    if choose_device(settings.device).type == "cuda":
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        build = f"capability {capability}, CUDA {torch.version.cuda}, driver {driver_version()}"
        return f"GPU {torch.cuda.get_device_name()} ({build})"
    beside = f", though {why_no_gpu()}" if settings.device == "auto" and driver_version() else ""
    return f"CPU, {torch.get_num_threads()} threads{beside}"


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
    "device": device,
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
