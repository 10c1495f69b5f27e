"""Nobody ever gets another's answer: many adapters, few slots, loads, evictions and new versions in between.

Every adapter answers each prompt in its own way (asserted), so that a text says whose it is; peft says what is right.
"""

import asyncio
import random
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from services.inference.build import assemble
from services.inference.engine.interface import GenerationRequest
from services.inference.generation import PromptRequest
from services.inference.prompts import RawIds
from services.inference.serving import Serving
from services.inference.settings import InferenceSettings
from shared.errors import InvalidRequest, NotFound, Overloaded
from shared.storage.artifacts import new_id
from shared.storage.manifests import Manifest
from tests.services.inference.adapters_on_disk import EVERYTHING, greedy, publish
from tests.services.inference.harness import Tiny

ADAPTERS, REQUESTS, CLIENTS, TOKENS = 32, 1200, 24, 8
PROMPTS = ("def f(x): return x", "What does json.dumps do?", "a")
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Canaries:
    """Adapters and what each must say to each prompt, by version: the ids."""

    tiny: Tiny
    prompts: list[list[int]]
    answers: dict[str, list[list[list[int]]]]
    spare: dict[str, dict[str, torch.Tensor]]

    def replace(self, adapter: str) -> None:
        """Put the next version of an adapter's weights in its place on disk, under the same id."""
        folder = self.tiny.store.adapter(adapter)
        with self.tiny.store.staged() as staged:
            shutil.copytree(folder, staged, dirs_exist_ok=True)
            (staged / "manifest.json").unlink()
            save_file(self.spare.pop(adapter), staged / WEIGHTS, metadata={"format": "pt"})
            shutil.rmtree(folder)
            publish(self.tiny.store, staged, adapter, self.tiny.manifest, template=None)


@pytest.fixture(scope="module")
def canaries(tiny: Tiny) -> Canaries:
    """32 adapters of two kinds in turn, made of one each; every fourth has a second version in hand."""
    tokenizer = tiny.load().tokenizer
    prompts = [tokenizer.encode(text, add_special_tokens=True) for text in PROMPTS]
    models = [
        _Family(tiny, tiny.adapter(seed=500, r=4)),
        _Family(tiny, tiny.adapter(seed=501, r=8, targets=EVERYTHING)),
    ]
    answers: dict[str, list[list[list[int]]]] = {}
    spare: dict[str, dict[str, torch.Tensor]] = {}
    for number in range(ADAPTERS):
        family = models[number % 2]
        adapter = family.publish(weights := family.weights(number))
        answers[adapter] = [family.answers(weights, prompts)]
        if number % 4 == 0:
            spare[adapter] = family.weights(1000 + number)
            answers[adapter].append(family.answers(spare[adapter], prompts))
    for place in range(len(prompts)):
        said = [tuple(version[place]) for versions in answers.values() for version in versions]
        assert len(set(said)) == len(said), "two canaries sing the same"
    return Canaries(tiny, prompts, answers, spare)


class _Family:
    """Adapters of one configuration, and peft's words for them."""

    def __init__(self, tiny: Tiny, pattern: str) -> None:
        self._tiny, self._folder = tiny, tiny.store.adapter(pattern)
        self._pattern = load_file(self._folder / WEIGHTS)
        base = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self._model = PeftModel.from_pretrained(base, str(self._folder)).eval()

    def weights(self, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {key: 0.2 * torch.randn(value.shape, generator=generator) for key, value in self._pattern.items()}

    def publish(self, weights: dict[str, torch.Tensor]) -> str:
        adapter = new_id("adapter")
        with self._tiny.store.staged() as staged:
            shutil.copyfile(self._folder / "adapter_config.json", staged / "adapter_config.json")
            save_file(weights, staged / WEIGHTS, metadata={"format": "pt"})
            manifest: Manifest = self._tiny.manifest
            publish(self._tiny.store, staged, adapter, manifest, template=None)
        return adapter

    def answers(self, weights: dict[str, torch.Tensor], prompts: list[list[int]]) -> list[list[int]]:
        set_peft_model_state_dict(self._model, weights)
        return [greedy(self._model, prompt, TOKENS) for prompt in prompts]


class _Traffic:
    """Clients that ask at random and check every answer, and an operator who will not leave the server alone."""

    def __init__(self, serving: Serving, canaries: Canaries) -> None:
        self.serving, self.canaries = serving, canaries
        self.chance = random.Random(3)
        self.wrong: list[tuple[str, list[int]]] = []
        self.asked = self.refused = 0
        # The versions an answer may come from: from what was newest when asked to what is newest when answered.
        self.newest = dict.fromkeys(canaries.answers, 0)

    async def client(self) -> None:
        while self.asked < REQUESTS:
            self.asked += 1
            adapter = self.chance.choice(list(self.newest))
            place = self.chance.randrange(len(PROMPTS))
            oldest = self.newest[adapter]
            asked = PromptRequest([RawIds(self.canaries.prompts[place])], adapter, GenerationRequest(()), TOKENS)
            try:
                async with self.serving.generate(asked) as generation:
                    ids = [each.tokens[-1].id async for each in generation.progress()]
            except (Overloaded, NotFound, InvalidRequest):
                # Every slot in use for long, or a load that read the folder while its version changed.
                self.refused += 1
                continue
            versions = self.canaries.answers[adapter][oldest : self.newest[adapter] + 1]
            if ids not in [version[place] for version in versions]:
                self.wrong.append((adapter, ids))

    async def operator(self) -> None:
        while self.asked < REQUESTS:
            with suppress(Overloaded, NotFound, InvalidRequest):
                await self._deed(self.chance.choice(list(self.newest)), self.chance.random())
            await asyncio.sleep(0.005)

    async def _deed(self, adapter: str, deed: float) -> None:
        adapters = self.serving.adapters
        if deed < 0.4:
            adapters.unload(adapter)
        elif deed < 0.7:
            await adapters.load(adapter)
        elif deed < 0.8:
            await adapters.pin(adapter)
            await asyncio.sleep(0.01)
            adapters.unpin(adapter)
        elif self.canaries.spare:
            self.new_version(self.chance.choice(list(self.canaries.spare)))

    def new_version(self, adapter: str) -> None:
        """No await in between: nobody asks while the version changes."""
        self.canaries.replace(adapter)
        self.serving.adapters.unload(adapter)
        # A load in flight may still bring the old one; what is asked from now on begins a load of its own.
        self.newest[adapter] += 1


@pytest.mark.slow
def test_no_canary_sings_anothers_song(canaries: Canaries) -> None:
    settings: dict[str, Any] = {"slots": 12, "adapter_slots": 6, "context": 64, "queue_requests": 1000}
    serving = assemble(canaries.tiny.load(), InferenceSettings(**settings), canaries.tiny.store)
    traffic = _Traffic(serving, canaries)

    async def everything() -> None:
        await asyncio.gather(traffic.operator(), *(traffic.client() for _ in range(CLIENTS)))
        # Then everyone once more in peace, by the newest version only.
        for adapter in canaries.answers:
            asked = PromptRequest([RawIds(canaries.prompts[0])], adapter, GenerationRequest(()), TOKENS)
            async with serving.generate(asked) as generation:
                ids = [each.tokens[-1].id async for each in generation.progress()]
            assert ids == canaries.answers[adapter][-1 if not canaries.spare else traffic.newest[adapter]][0]
        for entry in serving.adapters.entries():
            assert entry.references == 0
        await serving.close()

    asyncio.run(everything())
    assert traffic.wrong == []
    assert traffic.asked >= REQUESTS
    assert traffic.refused < REQUESTS / 20

    assert serving.adapters.loads > 100
    assert serving.adapters.evictions > 50
    assert not canaries.spare, "not every version was changed"
