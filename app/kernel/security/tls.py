"""
TLS of the API: the certificate of the server, read again when its files change, and what commands trust.

A certificate that cannot be used is refused with its setting. A replaced one that cannot be used is logged, and the old
one stays.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from urllib.parse import urlsplit

from app.kernel import log
from app.kernel.errors import InvalidSettings, Problem
from app.kernel.sections.servers import ApiSettings
from app.kernel.security.origins import is_loopback

_log = log.get(__name__)

_CERTIFICATE, _KEY = "api.tls_certificate", "api.tls_key"
#: What changes with a file: its place on the disk, its length, and the time of its last change.
Stamp = tuple[tuple[int, int, int], ...]


class ServerCertificate:
    """The certificate and the key of a server, in a context that all its connections use."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises InvalidSettings, with the setting whose file cannot be used."""
        self._certificate, self._key = certificate, key
        self._stamp = self._stamped()
        self.context = _context(certificate, key)

    def refresh(self) -> None:
        """Read the files again if they have changed. Connections that exist keep the old certificate."""
        try:
            stamp = self._stamped()
        except InvalidSettings:
            return  # they are being replaced
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            _context(self._certificate, self._key)  # a wrong pair would spoil the context that is used
            self.context.load_cert_chain(self._certificate, self._key, password=_no_passphrase)
        except InvalidSettings as error:
            _log.error("certificate_not_replaced", error=str(error))
        else:
            _log.info("certificate_replaced", file=str(self._certificate))

    def _stamped(self) -> Stamp:
        found = []
        for setting, path in ((_CERTIFICATE, self._certificate), (_KEY, self._key)):
            try:
                status = path.stat()
            except OSError as error:
                raise _invalid(setting, path, f"cannot be read: {error.strerror}") from None
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)


def certificate_of(settings: ApiSettings) -> ServerCertificate | None:
    """Return the certificate of the API; None when it speaks plain HTTP. Raises InvalidSettings."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    return ServerCertificate(settings.tls_certificate, settings.tls_key)


def verification(url: str, settings: ApiSettings) -> ssl.SSLContext | bool:
    """
    Return how a client of the API verifies it at a URL. False for plain HTTP, where nothing is loaded.

    At a loopback address of this installation, where no name fits, exactly the certificate of the settings is trusted;
    elsewhere the authorities of the system and those of `api.ca_file`. Raises InvalidSettings.
    """
    if not url.startswith("https://"):
        return False
    host = urlsplit(url).hostname or ""
    own = settings.tls_certificate
    if own is not None and (is_loopback(host) or host == "localhost"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        _load(context, "api.tls_certificate", own)
        return context
    context = ssl.create_default_context()
    if settings.ca_file is not None:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the file may have the server's own certificate
        _load(context, "api.ca_file", settings.ca_file)
    return context


def _load(context: ssl.SSLContext, setting: str, path: Path) -> None:
    try:
        context.load_verify_locations(path)
    except (OSError, ValueError) as error:
        raise _invalid(setting, path, f"has no certificates (PEM): {error}") from None


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return a context with this certificate. Raises InvalidSettings, with the file that is wrong."""
    for setting, path in ((_CERTIFICATE, certificate), (_KEY, key)):
        try:
            text = path.read_bytes()
        except OSError as error:
            raise _invalid(setting, path, f"cannot be read: {error.strerror}") from None
        wanted = b"CERTIFICATE" if setting == _CERTIFICATE else b"PRIVATE KEY"
        if b"-----BEGIN" not in text or wanted not in text:
            raise _invalid(setting, path, f"has no {wanted.decode().lower()} (PEM)")
        if setting == _KEY and b"ENCRYPTED" in text:
            raise _invalid(setting, path, "is encrypted: nobody could type its passphrase")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except ssl.SSLError as error:
        if "KEY_VALUES_MISMATCH" in (error.reason or ""):
            raise _invalid(_KEY, key, f"does not belong to the certificate {certificate}") from None
        raise _invalid(_CERTIFICATE, certificate, f"cannot be used with the key {key}: {error}") from None
    except (OSError, ValueError) as error:
        raise _invalid(_CERTIFICATE, certificate, f"cannot be used with the key {key}: {error}") from None
    return context


def _no_passphrase() -> str:
    """Without it, OpenSSL would ask for a passphrase at the terminal."""
    return ""


def _invalid(setting: str, path: Path, message: str) -> InvalidSettings:
    return InvalidSettings([Problem(setting, f"{path} {message}", "a PEM file that this user can read")])
