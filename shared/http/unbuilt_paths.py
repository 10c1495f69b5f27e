"""What a client is told that asks for a path which is not here: what to use instead, or how to spell it."""

import re

_CHAT = "use POST /v1/chat/completions"
_EMBEDDINGS = "not built; use a server of embedding models beside this one"
# Paths of OpenAI's API and of other servers' that clients know: regular expression → what to do.
_INSTEAD = {
    r"/v1/?": "this is the base URL for OpenAI's clients; GET / says where everything is",
    r"/v1/responses/.+": "of a response there are POST /v1/responses, and GET and DELETE /v1/responses/{id}",
    r"/v1/conversations(/.*)?": f"conversations are not kept; {_CHAT} with all messages",
    r"/v1/messages(/.*)?|/v1/complete": f"Anthropic's API is not spoken here; {_CHAT}",
    r"/v1/embeddings|/embeddings?|/embed|/api/embed(dings)?": f"embeddings are {_EMBEDDINGS}",
    r"/v1/(rerank|score|pooling|classify)|/rerank": f"ranking is {_EMBEDDINGS}",
    r"/v1/moderations": f"moderation is not built; to ask a model of your own, {_CHAT}",
    r"/v1/(images|audio|videos|realtime)(/.*)?": f"models here read and write text; {_CHAT}",
    r"/v1/edits|/v1/engines(/.*)?": f"OpenAI has given this up; {_CHAT}",
    r"/v1/(assistants|threads|vector_stores|containers|chatkit)(/.*)?": f"assistants are not built; {_CHAT}",
    r"/v1/batches(/.*)?": "batches are not built; requests that come at the same time are batched while they run",
    r"/v1/uploads(/.*)?": "uploads in parts are not built; POST /v1/files takes large files",
    r"/v1/(evals|graders)(/.*)?|/v1/fine_tuning/alpha(/.*)?": "evaluations are not built; use validation_file",
    r"/v1/fine_tuning/checkpoints(/.*)?": "permissions are not built; a checkpoint belongs to its job's project",
    r"/v1/organization(/.*)?": "organizations are not built; a key belongs to a project",
    r"/v1/tokenize|/tokenize|/detokenize": "POST /generate with `decoder_input_details` gives token ids",
    r"/api/(chat|generate|tags|show|ps|version|pull)": f"Ollama's API is not spoken here; {_CHAT}",
    r"/completion|/infill": "llama.cpp's own API is not spoken here; use POST /v1/completions",
    r"/invocations|/vertex": "use POST /generate",
}
_OPENAIS = re.compile(
    r"/(chat/completions|completions|models|files|fine_tuning|responses|embeddings|moderations)(/.*)?"
)
_TWICE = re.compile(r"(/v1){2,}(/.*)?")


def hint(path: str) -> str:
    """What to do instead of asking for `path`, as the end of a sentence; empty if nobody is known to ask for it."""
    if _TWICE.fullmatch(path):
        return "/v1 stands there twice; end the client's base URL with one /v1"
    if _OPENAIS.fullmatch(path):
        return "OpenAI's paths begin with /v1; end the client's base URL with /v1"
    return next((instead for known, instead in _INSTEAD.items() if re.fullmatch(known, path)), "")
