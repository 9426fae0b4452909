"""Where a tenant's prefixes are kept: a name that nobody outside this process can work out.

A client that could choose or guess the name of another tenant's tree could ask, by the time to the
first token, whether a text is in it (CVE-2025-46570). So the name is made here from the identity
that the server has verified, never from anything a client sends.
"""

import hmac
import secrets


class CacheRoots:
    """Names of trees. The secret lives as long as this object and is never written down."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        # Kept, because each request asks: as many as there are tenants.
        self._names: dict[str, str] = {}

    def of(self, tenant: str) -> str:
        """`Request.cache_root` for `tenant`: the same for the same tenant until the server ends."""
        name = self._names.get(tenant)
        if name is None:
            name = hmac.digest(self._secret, tenant.encode(), "sha256").hex()
            self._names[tenant] = name
        return name
