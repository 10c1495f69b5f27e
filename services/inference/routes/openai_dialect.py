"""What OpenAI's answers to chats and to completions share: names, errors, usage."""

import secrets
import time
from copy import copy
from typing import Any

from services.inference.engine.interface import FinishReason as EngineReason
from services.inference.generation import Candidate, Generation
from services.inference.serving import Serving
from shared.errors import TunesmithError
from shared.inference_api.openai import (
    ChatCompletionBody,
    CompletionBody,
    FinishReason,
    UsageJson,
)

REASONS: dict[EngineReason | None, FinishReason] = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}
_ADAPTER_CODES = frozenset({"model_not_found", "adapter_refused", "adapter_corrupt", "adapter_too_large"})


class OpenAIDialect:
    """What both routes' answers share.

    Args:
        model_name: what the gateway's client called the model; the body's own name if empty.
        logprobs: whether log probabilities were asked for.
    """

    prefix: str
    fields: dict[str, str]
    grammar_field = "response_format"

    def __init__(
        self, serving: Serving, body: ChatCompletionBody | CompletionBody, model_name: str, *, logprobs: bool
    ) -> None:
        base = serving.base
        self._token_bytes, self._logprobs_wanted, self._with_usage = serving.token_bytes, logprobs, body.includes_usage
        self._answer: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model_name or body.model or base.id,
            "system_fingerprint": f"{base.revision[:12]}-{base.precision}",
        }

    def translated(self, error: TunesmithError) -> TunesmithError:
        # A copy: one failed load is reported to many requests.
        own = copy(error)
        if error.code in _ADAPTER_CODES:
            own.param = "model"
        elif error.code == "invalid_grammar":
            own.param = self.grammar_field
        elif error.param is not None:
            own.param = self.fields.get(error.param, error.param)
        return own

    def _says_something(self, candidate: Candidate) -> bool:
        tokens = candidate.tokens
        return bool(tokens and (len(tokens) == 1 or tokens[-1].text or self._logprobs_wanted))


def escaped(content: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in content)


def usage_of(generation: Generation) -> UsageJson:
    prompt, completion = generation.prompt_tokens, generation.generated
    return UsageJson(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
