"""The alternatives to Tunesmith: transformers' `generate` with one merged adapter, and PEFT in its two ways.

Everything greedy, fp32, the same prompts, exactly as many new tokens.
"""

import time
import warnings
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.serve_workload import Workload


def merged_model(work: Workload) -> Any:
    """The base with its one adapter merged into the weights: no LoRA arithmetic is left."""
    return _with_adapter(work, work.adapters[0]).merge_and_unload().eval()


def peft_model(work: Workload, adapters: int) -> Any:
    """The base with several adapters side by side, named by their ids."""
    model = _with_adapter(work, work.adapters[0])
    for adapter in work.adapters[1:adapters]:
        model.load_adapter(str(work.store.adapter(adapter)), adapter_name=adapter)
    return model.eval()


def _with_adapter(work: Workload, adapter: str) -> Any:
    base = AutoModelForCausalLM.from_pretrained(work.base_folder, dtype=torch.float32, local_files_only=True)
    with warnings.catch_warnings():
        # peft 0.21 reads a property that transformers 5.23 has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(base, str(work.store.adapter(adapter)), adapter_name=adapter)


def generate(model: Any, prompts: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
    """New ids of each prompt, all in one batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)
    new: list[list[int]] = output[:, width:].tolist()
    return new


def batch_speed(model: Any, work: Workload, rows: int) -> float:
    """Tokens per second of one batch, prefill included."""
    prompts = [work.prompt(number) for number in range(rows)]
    started = time.perf_counter()
    generate(model, prompts, work.tokens)
    return rows * work.tokens / (time.perf_counter() - started)


def swap_speed(model: Any, work: Workload, requests: list[tuple[int, str]], rows: int) -> float:
    """Tokens per second of PEFT switching its active adapter between batches of `rows` requests of one adapter."""
    started = time.perf_counter()
    for first in range(0, len(requests), rows):
        batch = requests[first : first + rows]
        model.set_adapter(batch[0][1])
        generate(model, [work.prompt(number) for number, _ in batch], work.tokens)
    return len(requests) * work.tokens / (time.perf_counter() - started)


def mixed_speed(model: Any, work: Workload, requests: list[tuple[int, str]]) -> float:
    """Tokens per second of one batch of many adapters by PEFT's `adapter_names`."""
    started = time.perf_counter()
    prompts = [work.prompt(number) for number, _ in requests]
    generate(model, prompts, work.tokens, adapter_names=[adapter for _, adapter in requests])
    return len(requests) * work.tokens / (time.perf_counter() - started)
