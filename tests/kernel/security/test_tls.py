"""The certificate of the API: files that cannot be used, replacement, and whom commands trust."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from pathlib import Path

import pytest

from app.kernel.errors import InvalidSettings
from app.kernel.sections.servers import ApiSettings
from app.kernel.security import tls
from app.kernel.settings import load

CERTIFICATES = Path(__file__).parent / "certificates"


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        ("none.pem", "one.key.pem", "api.tls_certificate: .*none.pem cannot be read"),
        ("one.pem", "none.pem", "api.tls_key: .*none.pem cannot be read"),
        ("one.pem", "two.key.pem", "api.tls_key: .*two.key.pem does not belong to the certificate"),
        ("one.key.pem", "one.pem", "api.tls_certificate: .*one.key.pem has no certificate"),
        ("one.pem", "one.pem", "api.tls_key: .*one.pem has no private key"),
        ("one.pem", "encrypted.key.pem", "api.tls_key: .*is encrypted"),
        (".", "one.key.pem", "api.tls_certificate: .*cannot be read"),
    ],
)
def test_wrong_files_are_refused_with_their_setting(certificate: str, key: str, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        tls.ServerCertificate(CERTIFICATES / certificate, CERTIFICATES / key)


def test_a_damaged_certificate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.pem").write_text("-----BEGIN CERTIFICATE-----\nxxxx\n-----END CERTIFICATE-----\n")
    with pytest.raises(InvalidSettings, match="cannot be used"):
        tls.ServerCertificate(tmp_path / "c.pem", CERTIFICATES / "one.key.pem")


def test_certificate_and_key_are_set_together() -> None:
    with pytest.raises(InvalidSettings, match="belong together"):
        load(environment={"ARRIERO_API__TLS_KEY": "/x/key.pem"})


def name_of(certificate: tls.ServerCertificate) -> str:
    """The name in the certificate that a new connection gets."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with certificate.context.wrap_socket(theirs, server_side=True):
            pass

    thread = threading.Thread(target=serve)
    thread.start()
    context = ssl.create_default_context()
    for name in ("one", "two"):
        context.load_verify_locations(CERTIFICATES / f"{name}.pem")
    context.check_hostname = False
    with context.wrap_socket(ours) as client:
        found = client.getpeercert()
    thread.join()
    assert found is not None
    return str(found["subjectAltName"][0][1])


def test_a_replaced_certificate_holds_for_new_connections_and_a_wrong_one_never(tmp_path: Path) -> None:
    for part in ("", ".key"):
        shutil.copy(CERTIFICATES / f"one{part}.pem", tmp_path / f"api{part}.pem")
    certificate = tls.ServerCertificate(tmp_path / "api.pem", tmp_path / "api.key.pem")
    certificate.refresh()
    assert name_of(certificate) == "one.example.com"

    shutil.copy(CERTIFICATES / "two.pem", tmp_path / "api.pem")
    certificate.refresh()  # its key is not there yet
    assert name_of(certificate) == "one.example.com"
    shutil.copy(CERTIFICATES / "two.key.pem", tmp_path / "api.key.pem")
    certificate.refresh()
    assert name_of(certificate) == "two.example.com"

    (tmp_path / "api.pem").unlink()
    certificate.refresh()
    assert name_of(certificate) == "two.example.com"


def test_what_commands_trust() -> None:
    own = ApiSettings(tls_certificate=CERTIFICATES / "one.pem", tls_key=CERTIFICATES / "one.key.pem")
    assert tls.verification("http://127.0.0.1:1", own) is False
    here = tls.verification("https://127.0.0.1:1", own)
    assert isinstance(here, ssl.SSLContext)
    assert (here.check_hostname, here.verify_mode) == (False, ssl.CERT_REQUIRED)
    assert len(here.get_ca_certs()) <= 1, "only its own"
    elsewhere = tls.verification("https://one.example.com", own)
    assert isinstance(elsewhere, ssl.SSLContext)
    assert elsewhere.check_hostname

    with pytest.raises(InvalidSettings, match=r"api\.ca_file"):
        tls.verification("https://one.example.com", ApiSettings(ca_file=CERTIFICATES / "one.key.pem"))
