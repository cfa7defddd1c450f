"""Certificates of one's own authority beside the system's: one endpoint may have the former, another the latter."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from cowest_serving.contract import SettingsError

DEBIANS_CA = "/etc/ssl/certs/ca-certificates.crt"


def trust(more: Path, work: Path) -> None:
    """Clients take one file or the other; they are told of one that holds both. Raises `SettingsError`."""
    system = [Path(path) for path in (ssl.get_default_verify_paths().openssl_cafile, DEBIANS_CA)]
    both = work / "ca.pem"
    try:
        text = more.read_text(encoding="utf-8")
        ssl.create_default_context(cadata=text)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{more} (strong.caBundleRef): wanted certificates as PEM, saw: {error}. Correct the ConfigMap."
        ) from None
    work.mkdir(parents=True, exist_ok=True)
    known = next((path.read_text(encoding="utf-8") for path in system if path.is_file()), "")
    both.write_text(f"{known}\n{text}", encoding="utf-8")
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        os.environ[name] = str(both)
