"""Headers that the gateway sends with a generation. A client's own headers of these names never get this far."""

REQUEST_ID = "x-request-id"
# What the client called the model: OpenAI's answers repeat it, while the body names an adapter by its id.
MODEL_NAME = "x-model-name"
# Which project asks: the same opaque text for each of its requests. It is not the project's id and does not lead to it.
PROJECT_TAG = "x-project-tag"
PROJECT_TAG_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
