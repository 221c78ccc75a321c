"""Authorities and certificates for tests, and a server in front of a real one that speaks TLS for it."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

#: The first message of a client of Postgres that wants TLS, or encryption by GSSAPI.
_WANTS_TLS, _WANTS_GSS = 80_877_103, 80_877_104


@dataclass(frozen=True)
class Authority:
    """An authority that signs certificates, with its own in a file."""

    file: Path
    _certificate: x509.Certificate
    _key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, directory: Path, name: str = "authority") -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        made = _builder(name, name, key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        certificate = made.sign(key, hashes.SHA256())
        file = directory / f"{name}.pem"
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return cls(file, certificate, key)

    def context(self, *names: str) -> ssl.SSLContext:
        """The context of a server with a certificate for these names or addresses."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.issue(*names))
        return context

    def issue(self, *names: str) -> Path:
        """A file with a private key, and a certificate for these names or addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = self._certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        made = _builder(names[0], str(issuer), key)
        made = made.add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
        certificate = made.sign(self._key, hashes.SHA256())
        file = self.file.with_name(f"{names[0]}-{certificate.serial_number:x}.pem")
        form = serialization.Encoding.PEM
        private = key.private_bytes(form, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        file.write_bytes(private + certificate.public_bytes(form))
        return file


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(name: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    named = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    by = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)])
    return (
        x509.CertificateBuilder()
        .subject_name(named)
        .issuer_name(by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )


@contextmanager
def tls_in_front_of(
    port: int, context: ssl.SSLContext, *, postgres: bool = False, host: str = "127.0.0.1"
) -> Iterator[int]:
    """
    Accept TLS for a server on a loopback port, and yield the port for it.

    The embedded servers are built without TLS. With `postgres`, TLS begins as Postgres's protocol says; a client that
    does not want it is disconnected, as by `hostssl`.
    """
    loop = asyncio.new_event_loop()
    served: set[asyncio.Task[None]] = set()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while postgres and (code := int.from_bytes((await reader.readexactly(8))[4:], "big")) != _WANTS_TLS:
            if code != _WANTS_GSS:
                return
            writer.write(b"N")
        if postgres:
            writer.write(b"S")
        await writer.start_tls(context)
        behind_reader, behind = await asyncio.open_connection("127.0.0.1", port)
        try:
            ways = [
                asyncio.ensure_future(pass_on(reader, behind)),
                asyncio.ensure_future(pass_on(behind_reader, writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            behind.transport.abort()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        served.add(task)
        try:
            await connect(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client is gone, or does not trust the certificate
        finally:
            writer.transport.abort()
            served.discard(task)

    async def end() -> None:
        server.close()
        for task in served:
            task.cancel()
        await asyncio.gather(*served, return_exceptions=True)
        for _ in range(10):  # until the transports have closed their sockets
            await asyncio.sleep(0)

    server = loop.run_until_complete(asyncio.start_server(serve, host, 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
