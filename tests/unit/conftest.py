"""Fixtures of several unit tests."""

from __future__ import annotations

import asyncio
import json

import pytest


@pytest.fixture
def make_engine():
    """build_engine; every engine is closed when the test ends."""
    from support.scripted_engine import build_engine

    engines = []

    def build(*arguments, **options):
        engines.append(build_engine(*arguments, **options))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close(drain=False)


@pytest.fixture
def upstream():
    """A stand-in for Triton that answers each request with one text unless a test scripts it."""
    from scripted_upstream import ScriptedUpstream, answer

    made = ScriptedUpstream()
    made.script = [answer()]
    return made


@pytest.fixture
def ask_rest(upstream):
    """Send a request to the REST application of the front, in this thread."""
    import httpx

    from front_ports import configure
    from oarlock.serve.front.rest.routes import make_rest_app

    app = make_rest_app(configure(max_body=100_000), upstream)

    def ask(path, content=None, method=None, **headers):
        async def run():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
                body = content if isinstance(content, (bytes, type(None))) else json.dumps(content).encode()
                names = {name.replace("_", "-"): value for name, value in headers.items()}
                verb = method or ("GET" if content is None else "POST")
                return await client.request(verb, path, content=body, headers=names)

        return asyncio.run(run())

    return ask


@pytest.fixture(scope="module")
def echo():
    """An application that echoes requests."""
    from support.guarded_echo import Echo

    return Echo()


@pytest.fixture(scope="module")
def port(echo):
    """A port of `echo` behind the guard: bodies of up to 10,000 bytes, four requests of a client."""
    from front_ports import GUARD_S, configure, serve_app
    from oarlock.serve.front.admission import Admission
    from oarlock.serve.front.http.server import guard_app
    from oarlock.serve.front.keys import Keys
    from support.guarded_echo import error

    options = configure(max_body=10_000, body_seconds=GUARD_S)
    with serve_app(guard_app(echo, options, Keys(), Admission(8, 4), error, open_paths=("/probe",)), options) as port:
        yield port


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with a tiny model of each family, as family_folders.Folders."""
    from support.family_folders import Folders

    return Folders(tmp_path_factory.mktemp("families"))
