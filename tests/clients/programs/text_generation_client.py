"""TGI's own Python client: generate, stream, chat."""

import os

from text_generation import Client

client = Client(os.environ["URL"], headers={"Authorization": f"Bearer {os.environ['KEY']}"}, timeout=60)
answer = client.generate("a", max_new_tokens=4)
assert answer.details.generated_tokens == 4
assert "".join(piece.token.text for piece in client.generate_stream("a", max_new_tokens=4)) == answer.generated_text
chat = client.chat(messages=[{"role": "user", "content": "Hello"}], max_tokens=4)
assert chat.choices[0].message.role == "assistant"
