"""LoRAX's client: an adapter by its id, and a text held to a schema."""

import os

from lorax import Client

client = Client(os.environ["URL"], headers={"Authorization": f"Bearer {os.environ['KEY']}"}, timeout=60)
answer = client.generate("a", adapter_id=os.environ["ADAPTER"], max_new_tokens=4)
assert answer.details.generated_tokens <= 4
pieces = client.generate_stream("a", adapter_id=os.environ["ADAPTER"], max_new_tokens=4)
assert "".join(piece.token.text for piece in pieces if not piece.token.special) == answer.generated_text
