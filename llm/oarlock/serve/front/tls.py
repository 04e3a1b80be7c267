"""Checks the server's certificate: whether it can be used, and for how long."""

from __future__ import annotations

import re
import ssl
import stat
import time
from pathlib import Path

from oarlock.environment.console import get_logger
from oarlock.errors import ConfigError
from oarlock.formats.files import read_bytes

logger = get_logger(__name__)

_WARN_DAYS = 30
_MAX_BYTES = 1 << 20
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_EXPIRED, _NOT_YET = 10, 9  # X509_V_ERR_...


def check_certificate(certificate: Path, key: Path) -> None:
    """Check a certificate and its key by a connection in memory.

    A warning is logged if the certificate expires soon, or other users may read the key.

    Args:
        certificate: PEM; the server's own certificate first, then those up to its authority.
        key: PEM, without a passphrase.

    Raises:
        ConfigError: when no client could connect with them.
    """
    text = read_bytes(certificate, limit=_MAX_BYTES, what="certificate in PEM", error=ConfigError).decode("latin-1")
    read_bytes(key, limit=_MAX_BYTES, what="key in PEM", error=ConfigError)
    server = _make_server_context(certificate, key)
    if key.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        mode = stat.S_IMODE(key.stat().st_mode)
        logger.info(f"{key} is the server's private key and other users may read it (mode {mode:04o}): chmod 600")
    first = _PEM.search(text)
    if first is None:
        raise ConfigError(f"--tls-certificate {certificate}: no certificate in PEM")
    try:
        left = _count_days_left(server, first.group())
    except ssl.SSLCertVerificationError as error:
        if error.verify_code not in (_EXPIRED, _NOT_YET):
            raise ConfigError(f"--tls-certificate {certificate}: {error.verify_message}") from error
        logger.info(f"{certificate}: {error.verify_message}; clients will refuse it")
        return
    except ssl.SSLError as error:
        raise ConfigError(f"--tls-certificate {certificate}: {error.reason or error}") from error
    if left < _WARN_DAYS:
        logger.info(f"{certificate}: the certificate expires in {left:.0f} days")


def _make_server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    encrypted = False

    def no_passphrase() -> str:
        nonlocal encrypted
        encrypted = True
        return ""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, no_passphrase)
    except (OSError, ValueError) as error:
        if encrypted:
            raise ConfigError(f"--tls-key {key}: it has a passphrase, which the server can't be given") from error
        reason = getattr(error, "reason", "") or ""
        if reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"--tls-key {key}: not the key of {certificate}") from error
        if isinstance(error, PermissionError):
            raise ConfigError(f"--tls-key {key} or --tls-certificate {certificate}: {error.strerror}") from error
        raise ConfigError(f"--tls-certificate {certificate}, --tls-key {key}: not usable: {reason or error}") from error
    return context


def _count_days_left(server: ssl.SSLContext, certificate: str) -> float:
    """Days until a certificate expires, by a handshake whose client trusts it alone."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cadata=certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = client.wrap_bio(to_client, to_server)
    waiting = [here, server.wrap_bio(to_server, to_client, server_side=True)]
    while waiting:  # each round advances one of them, or raises
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                continue
    peer = here.getpeercert() or {}
    return (ssl.cert_time_to_seconds(str(peer["notAfter"])) - time.time()) / 86400
