"""The shortest way through a running stack (`make up`), with the official `openai` client alone."""

import json
import os
import time
from pathlib import Path

from openai import OpenAI

here = json.loads(Path(os.environ.get("TUNESMITH_HOME", ".tunesmith"), "connection.json").read_text())
client = OpenAI(base_url=here["openai_base_url"], api_key=here["api_key"])

rows = [{"instruction": f"Say {n} twice.", "output": f"{n} {n}"} for n in range(40)]
data = "\n".join(map(json.dumps, rows)).encode()
file = client.files.create(file=("twice.jsonl", data), purpose="fine-tune")

job = client.fine_tuning.jobs.create(
    model="smollm2-135m-instruct",
    training_file=file.id,
    suffix="twice",
)
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(1)
    job = client.fine_tuning.jobs.retrieve(job.id)
print(job.status, job.fine_tuned_model, job.error)

answer = client.chat.completions.create(
    model=job.fine_tuned_model or "",
    messages=[{"role": "user", "content": "Say 7 twice."}],
    max_completion_tokens=20,
    temperature=0,
)
print(answer.choices[0].message.content)
