"""Simon Willison's `llm` with a model of its own configuration file."""

import os
import subprocess
import sys
from pathlib import Path

folder = Path(os.environ["LLM_USER_PATH"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: here\n  model_name: {os.environ['BASE']}\n  api_base: {os.environ['URL']}/v1\n"
    "  api_key_name: here\n  supports_schema: true\n"
)
run = [sys.executable, "-m", "llm"]
subprocess.run([*run, "keys", "set", "here", "--value", os.environ["KEY"]], check=True)
subprocess.run([*run, "-m", "here", "-o", "max_tokens", "8", "Hello"], check=True)
subprocess.run([*run, "-m", "here", "-c", "-o", "max_tokens", "8", "And again?"], check=True)
found = subprocess.run(
    [*run, "-m", "here", "-o", "max_tokens", "200", "--schema", "yes bool", "Is it so?"],
    check=True,
    capture_output=True,
    text=True,
)
assert '"yes"' in found.stdout, found.stdout
