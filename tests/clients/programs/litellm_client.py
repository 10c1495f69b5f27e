"""LiteLLM's library with fine-tuning jobs, and its proxy for chats (its proxy's own jobs are for paying users)."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import litellm
from openai import OpenAI

URL, KEY, BASE = os.environ["URL"], os.environ["KEY"], os.environ["BASE"]
ASKED = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}

reply = litellm.completion(model=f"openai/{BASE}", api_base=f"{URL}/v1", api_key=KEY, **ASKED)
pieces = litellm.completion(model=f"openai/{BASE}", api_base=f"{URL}/v1", api_key=KEY, stream=True, **ASKED)
streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
assert streamed == reply.choices[0].message.content

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"days": {"enum": [1, 2]}}}},
}
offer = {**ASKED, "max_tokens": 200, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
calls = litellm.completion(model=f"openai/{BASE}", api_base=f"{URL}/v1", api_key=KEY, **offer).choices[0].message
chunks = list(litellm.completion(model=f"openai/{BASE}", api_base=f"{URL}/v1", api_key=KEY, stream=True, **offer))
whole = litellm.stream_chunk_builder(chunks).choices[0].message
assert whole.tool_calls[0].function == calls.tool_calls[0].function
answers = [{"role": "tool", "tool_call_id": call.id, "content": "4 degrees"} for call in calls.tool_calls]
history = [*ASKED["messages"], calls.model_dump(), *answers]
litellm.completion(
    model=f"openai/{BASE}", api_base=f"{URL}/v1", api_key=KEY, messages=history, tools=[TOOL], max_tokens=8
)

provider = {"custom_llm_provider": "openai", "api_base": f"{URL}/v1", "api_key": KEY}
rows = "".join(f'{{"instruction": "What is {n}?", "output": "It is {n}."}}\n' for n in range(12))
file = litellm.create_file(file=("d.jsonl", rows.encode()), purpose="fine-tune", **provider)
job = litellm.create_fine_tuning_job(model=BASE, training_file=file.id, **provider)
assert job.id in {listed.id for listed in litellm.list_fine_tuning_jobs(**provider)}
litellm.cancel_fine_tuning_job(fine_tuning_job_id=job.id, **provider)

port = os.environ["FREE_PORT"]
with tempfile.TemporaryDirectory() as folder:
    config = Path(folder) / "config.yaml"
    config.write_text(
        f"model_list:\n  - model_name: here\n    litellm_params:\n      model: openai/{BASE}\n"
        f"      api_base: {URL}/v1\n      api_key: {KEY}\n"
    )
    command = [str(Path(sys.executable).with_name("litellm")), "--config", str(config), "--port", str(port)]
    proxy_key = {"LITELLM_MASTER_KEY": "sk-the-proxy-s-own"}
    proxy = subprocess.Popen([*command, "--host", "127.0.0.1"], cwd=folder, env=os.environ | proxy_key)
    try:
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health/liveliness").is_success:
                    break
            except httpx.TransportError:
                pass
            assert proxy.poll() is None, "the proxy ended"
            time.sleep(0.2)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=proxy_key["LITELLM_MASTER_KEY"], max_retries=0)
        passed_on = client.chat.completions.create(model="here", **ASKED)
        assert passed_on.choices[0].message.content == reply.choices[0].message.content
    finally:
        proxy.terminate()
        proxy.wait(30)
