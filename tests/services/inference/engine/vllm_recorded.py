"""What a real vLLM server answered to what the engine asks of it: recorded by `make test-vllm` with `--record`.

`vllm_recorded.json` holds requests and answers as they went over HTTP; an adapter's folder is written as FOLDER.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from services.inference.engine.interface import GenerationRequest, GrammarText, Sampling
from services.inference.engine.vllm_api import AdapterGone, Chunk, PromptScores, VllmApi
from shared.errors import InvalidRequest

FILE = Path(__file__).with_suffix(".json")
FOLDER = "FOLDER"
BASE, NAME = "smollm2-135m-instruct", "adapter-0@1.recorded"
PROMPT = (504, 2179, 5518, 282)
# Of SmolLM2.
STOP_IDS = (0, 2)


class Asked:
    """A grammar as the engine holds it, without a tokenizer."""

    def __init__(self, kind: Any, source: str) -> None:
        self.text = GrammarText(kind, source)

    def begin(self) -> Any:
        raise AssertionError("the server follows it")


def request(**options: Any) -> GenerationRequest:
    return GenerationRequest(PROMPT, **{"max_new_tokens": 3} | options)


ALL = Sampling(
    do_sample=True,
    temperature=0.8,
    top_k=20,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    frequency_penalty=0.2,
    presence_penalty=0.1,
    logit_bias=((284, 1.5), (30, -100.0)),
    seed=11,
)
STREAMS: Mapping[str, tuple[str, GenerationRequest]] = {
    "greedy": (BASE, request(top_logprobs=2)),
    "sampled in all ways": (BASE, request(sampling=ALL, ignore_eos=True, cache_scope="a project")),
    "regular expression": (BASE, request(grammar=Asked("regex", "(yes|no)"), max_new_tokens=8)),
    "schema": (BASE, request(grammar=Asked("json_schema", '{"enum": [1, 2]}'), max_new_tokens=8)),
    "lark": (BASE, request(grammar=Asked("lark", 'start: "yes" | "no"'), max_new_tokens=8)),
    "adapter": (NAME, request()),
    "unknown adapter": ("adapter-9@1.recorded", request()),
    "longer than the context": (BASE, request(max_new_tokens=100_000)),
    "grammar that is none": (BASE, request(grammar=Asked("lark", "start: missing"))),
}


async def streamed(api: VllmApi, name: str) -> list[Chunk]:
    """The chunks of one of `STREAMS`. Raises as `VllmApi.generate`."""
    return [chunk async for chunk in api.generate(*STREAMS[name])]


async def scored(api: VllmApi) -> PromptScores:
    return await api.read_prompt(BASE, request(prompt_logprobs=True, prompt_top_logprobs=2))


def _without_errors(work: Awaitable[Any]) -> Awaitable[None]:
    async def run() -> None:
        with suppress(AdapterGone, InvalidRequest):
            await work

    return run()


def everything(api: VllmApi, folder: Path) -> list[tuple[str, Callable[[], Awaitable[Any]]]]:
    """What is recorded, by name and in order."""
    return [
        ("load", lambda: api.load(NAME, folder)),
        ("load again", lambda: api.load(NAME, folder)),
        ("load what is not there", lambda: _without_errors(api.load("nothing", folder / "nowhere"))),
        ("adapters", api.adapters),
        *((name, lambda name=name: _without_errors(streamed(api, name))) for name in STREAMS),
        ("scores", lambda: scored(api)),
        ("unload", lambda: api.unload(NAME)),
        ("unload what is not there", lambda: api.unload("nothing")),
    ]


class Recorder(httpx.AsyncHTTPTransport):
    """Keeps what goes over HTTP."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.exchanges = str(folder), list[dict[str, Any]]()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await super().handle_async_request(request)
        content = (await answer.aread()).decode()
        await answer.aclose()
        self.exchanges.append(
            {
                "method": request.method,
                "path": request.url.path,
                "body": json.loads(request.content.decode().replace(self.folder, FOLDER) or "null"),
                "status": answer.status_code,
                "content": content.replace(self.folder, FOLDER),
            }
        )
        return httpx.Response(answer.status_code, text=content, request=request)


def record(url: str, folder: Path) -> dict[str, Any]:
    """Ask a server everything. Returns exchanges by name."""

    async def run() -> dict[str, Any]:
        recorder, found = Recorder(folder), {}
        async with httpx.AsyncClient(base_url=url, transport=recorder, timeout=300) as client:
            for name, ask in everything(VllmApi(client, STOP_IDS), folder):
                await ask()
                found[name] = recorder.exchanges.pop()
                assert not recorder.exchanges
        return found

    return asyncio.run(run())
