"""The opaque tag by which inference tells projects apart: the same for all requests of one, and not its name."""

import hashlib
import hmac

# Keys are hashed under the same secret: no tag may equal the hash of a key.
_PURPOSE = b"project tag\x00"


class ProjectTags:
    """Tags under an installation's secret; all its gateways make the same ones."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def tag(self, project: str) -> str:
        """32 hexadecimal digits; without the secret they do not lead to the project, nor the project to them."""
        return hmac.new(self._secret, _PURPOSE + project.encode(), hashlib.sha256).hexdigest()[:32]
