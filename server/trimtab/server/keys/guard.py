"""The guard: knows a caller by the key that was sent. Nothing here waits: keys are compared with what was last read.

A server without any key serves anybody, and listens on loopback alone (`preflight`). From the first key on a key is asked for.
"""

from collections.abc import Iterable, Mapping

from trimtab.server.database.database import text_of, utc_now
from trimtab.server.errors import Unauthenticated
from trimtab.server.keys.key import ANONYMOUS, OPERATOR, Caller, Key, public_part
from trimtab.server.keys.secret import Secret

__all__ = ["Guard"]

_NOBODY = "0" * 64
_NEEDED = "give a key of this server: `Authorization: Bearer …`"


class Guard:
    """Knows callers by `secret`, the operator's own key, and the keys of the last snapshot."""

    def __init__(self, secret: Secret, *, operator_key: str | None) -> None:
        self._secret = secret
        self._operator = None if operator_key is None else secret.digest(operator_key)
        self._keys: Mapping[str, Key] = {}

    def know(self, keys: Iterable[Key]) -> None:
        """These keys, and no others, from now on."""
        self._keys = {key.id: key for key in keys}

    @property
    def asks(self) -> bool:
        """Whether a key is asked for: once there is one, revoked ones included, there is no way back."""
        return self._operator is not None or bool(self._keys)

    def caller(self, authorization: str) -> Caller:
        """Who sent this `Authorization`.

        Raises:
            Unauthenticated: no valid key.
        """
        if not self.asks:
            return ANONYMOUS
        scheme, _, text = authorization.partition(" ")
        text = text.strip()
        if scheme.lower() != "bearer" or not text:
            raise Unauthenticated(_NEEDED, field="authorization")
        digest = self._secret.digest(text)
        public = public_part(text)
        key = None if public is None else self._keys.get(public)
        # The same comparisons whether or not there is such a key.
        is_operator = self._secret.equal(digest, self._operator or _NOBODY) and self._operator is not None
        is_key = self._secret.equal(digest, _NOBODY if key is None else key.digest)
        if is_operator:
            return OPERATOR
        if key is None or not is_key:
            raise Unauthenticated(_NEEDED, field="authorization")
        if not key.is_valid(text_of(utc_now())):
            raise Unauthenticated(f"key {key.id} has expired or was revoked; ask for a new one", field="authorization")
        return Caller(f"key:{key.id}", key.scopes, key.policy)
