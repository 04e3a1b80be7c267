"""TLS connections are counted from the start and have seconds for the handshake."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

import pytest
from test_server_keys import make_certificate

from oarlock.serve.front.admission import Admission
from oarlock.serve.front.http.tls_connections import TlsDoor

GUARD_S = 120


class _Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(data)


@contextlib.asynccontextmanager
async def serve_tls(folder, most, seconds):
    """(port, what counts the handshakes, context of a client)"""
    certificate, key = make_certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    handshakes = Admission(most, most, "handshakes")
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: TlsDoor(_Echo, context, handshakes, seconds), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], handshakes, ssl.create_default_context(cafile=certificate)


def run(work):
    asyncio.run(asyncio.wait_for(work, GUARD_S))


def test_silent_connections_are_counted_and_closed(tmp_path):
    async def work():
        async with serve_tls(tmp_path, most=3, seconds=0.5) as (port, handshakes, context):
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
            for reader, _ in silent:  # five at once, three after their time is up
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
            while handshakes.num_open:
                await asyncio.sleep(0.01)
            reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
            writer.write(b"here")
            assert await reader.readexactly(4) == b"here"
            writer.close()

    run(work())


def test_plain_connections_are_refused(tmp_path):
    async def work():
        async with serve_tls(tmp_path, most=3, seconds=GUARD_S) as (port, handshakes, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert not (await reader.read()).startswith(b"HTTP")
            while handshakes.num_open:
                await asyncio.sleep(0.01)

    run(work())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_data_in_the_last_handshake_packet_is_kept(tmp_path, version):
    """One packet with the client's last handshake message and its request."""

    async def work():
        async with serve_tls(tmp_path, most=3, seconds=GUARD_S) as (port, handshakes, context):
            context.minimum_version = context.maximum_version = version
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)

            async def done(step):
                while True:
                    try:
                        return step()
                    except ssl.SSLWantReadError:
                        writer.write(outgoing.read())
                        incoming.write(await reader.read(1 << 16))

            await done(tls.do_handshake)
            tls.write(b"early")
            writer.write(outgoing.read())
            assert await done(lambda: tls.read(100)) == b"early"
            assert not handshakes.num_open
            writer.close()

    run(work())
