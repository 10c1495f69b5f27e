"""Adapters that must be refused, each with its reason."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.inference.adapters.weights import read_adapter
from shared.errors import InvalidRequest
from shared.storage.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.services.inference.harness import Tiny

Change = Callable[[dict[str, torch.Tensor]], None]
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="session")
def modules(tiny: Tiny) -> dict[str, tuple[int, int]]:
    model = tiny.load().model
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
    }


@pytest.fixture
def folder(tiny: Tiny, adapters: list[str], tmp_path: Path) -> Path:
    """A copy of a good adapter, to be spoilt."""
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        (tmp_path / name).write_bytes((tiny.store.adapter(adapters[0]) / name).read_bytes())
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Change) -> None:
    tensors = {key: value.clone() for key, value in load_file(folder / ADAPTER_WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS)


def test_a_good_adapter_is_read_with_its_scaling(folder: Path, modules: dict[str, tuple[int, int]]) -> None:
    raw = load_file(folder / ADAPTER_WEIGHTS)
    weights = read_adapter(folder, modules, max_rank=8)
    assert weights.rank == 8
    assert sorted(weights.pairs) == [f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ("q_proj", "v_proj")]
    a, b = weights.pairs["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(a, raw[KEY])
    torch.testing.assert_close(b, raw[KEY.replace("lora_A", "lora_B")] * 4)
    assert weights.nbytes == sum(t.numel() * 4 for t in raw.values())
    change_config(folder, use_rslora=True)
    _, b = read_adapter(folder, modules, max_rank=8).pairs["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(b, raw[KEY.replace("lora_A", "lora_B")] * 32 / 8**0.5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"a_key_of_the_future": 1}, "a_key_of_the_future"),
        ({"target_modules": ["q_proj"]}, "belong to no target layer"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "missing"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ".*q_proj"}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"r": 4}, "shape"),
        ({"r": 0}, "positive"),
        ({"r": 300}, "limit"),
        ({"r": True}, "positive"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "finite"),
        ({"lora_alpha": 1e308}, "overflows float32"),
        ({"target_modules": [f"layer-{n}" for n in range(100_000)]}, "layer-0"),
    ],
)
def test_configurations_that_are_refused(
    folder: Path, modules: dict[str, tuple[int, int]], changes: dict[str, Any], reason: str
) -> None:
    change_config(folder, **changes)
    refuse(folder, modules, reason)


def drop(key: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]

    return change


def put(key: str, value: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({key: value})


def poison(value: float, key: str = KEY) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key].view(-1)[3] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop(KEY), "missing"),
        (drop(KEY.replace("lora_A", "lora_B")), "missing"),
        (put("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", torch.zeros(8, 32)), "no target layer"),
        (put("stray", torch.zeros(1)), "no target layer"),
        (put(KEY, torch.zeros(8, 33)), "shape"),
        (put(KEY, torch.zeros(4, 32)), "shape"),
        (put(KEY, torch.zeros(8, 32, dtype=torch.int32)), "dtype"),
        (poison(float("nan")), "NaN"),
        (poison(float("inf")), "NaN"),
        (poison(3e38, KEY.replace("lora_A", "lora_B")), "overflows float32"),
    ],
)
def test_tensors_that_are_refused(
    folder: Path, modules: dict[str, tuple[int, int]], change: Change, reason: str
) -> None:
    change_tensors(folder, change)
    refuse(folder, modules, reason)


@pytest.mark.parametrize("lie", ["longer", "shape", "overlap", "no json", "truncated", "empty", "huge header"])
def test_lying_headers_are_refused(folder: Path, modules: dict[str, tuple[int, int]], lie: str) -> None:
    path = folder / ADAPTER_WEIGHTS
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    first, second, *_ = (key for key in header if key != "__metadata__")
    if lie == "longer":
        header[first]["data_offsets"][1] += 1 << 30
    elif lie == "shape":
        header[first]["shape"] = [1 << 40, 1 << 40]
    elif lie == "overlap":
        header[second]["data_offsets"] = header[first]["data_offsets"]
    text = b"{{{" if lie == "no json" else json.dumps(header).encode()
    spoilt = struct.pack("<Q", len(text)) + text + body
    if lie == "truncated":
        spoilt = data[: len(data) // 2]
    elif lie == "empty":
        spoilt = b""
    elif lie == "huge header":
        spoilt = struct.pack("<Q", 1 << 60) + data[8:]
    path.write_bytes(spoilt)
    refuse(folder, modules, "cannot be read")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"peft_type": "LORA"}'])
def test_a_broken_configuration_is_refused(folder: Path, modules: dict[str, tuple[int, int]], text: str) -> None:
    (folder / ADAPTER_CONFIG).write_text(text)
    refuse(folder, modules, "")
    (folder / ADAPTER_CONFIG).unlink()
    refuse(folder, modules, "missing")


def refuse(folder: Path, modules: dict[str, tuple[int, int]], reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_adapter(folder, modules, max_rank=256)
    assert refused.value.code == "adapter_refused"
    assert reason in refused.value.message
