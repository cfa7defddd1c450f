"""The way out of a closed network: which forward proxy HTTP_PROXY, HTTPS_PROXY and NO_PROXY name for an address.

Clients that ask for a proxy themselves instead of trusting the environment take no passwords from ~/.netrc.
"""

from __future__ import annotations

import urllib.parse
import urllib.request


def proxy_of(url: str) -> str | None:
    """None for this machine too: a proxy cannot reach it."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if host in ("", "localhost", "::1") or host.startswith("127.") or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(parts.scheme)
