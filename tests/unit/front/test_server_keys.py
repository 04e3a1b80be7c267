"""API keys and certificates of a server: what is accepted, the messages of refusals, and that keys are never printed."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.errors import ConfigError
from oarlock.serve.config import EngineConfig, FrontConfig, ServeConfig, TritonConfig
from oarlock.serve.front.keys import KEYS_VARIABLE, Keys, KeySource, read_keys, take_keys_of_environment
from oarlock.serve.front.tls import check_certificate

PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)


@given(st.lists(PRINTABLE, min_size=1, max_size=5, unique=True), st.binary(max_size=60))
def test_only_known_keys_are_accepted(known, other):
    keys = Keys(known)
    for key in known:
        assert keys.accept(f"Bearer {key}") and keys.accept(b"bearer " + key.encode())
        assert not keys.accept(f"Basic {key}") and not keys.accept(key) and not keys.accept(f"Bearer {key}x")
    assert keys.accept(b"Bearer " + other) == (other.strip() in {key.encode() for key in known})
    assert (
        not keys.accept(None) and not keys.accept("") and not keys.accept("Bearer ") and not keys.accept("Bearer ключ")
    )
    assert Keys().accept(None) and not Keys()
    keys.replace(["another"])
    assert keys.accept("Bearer another") and (known == ["another"] or not keys.accept(f"Bearer {known[-1]}"))
    assert not any(len(key) > 3 and key in repr(keys) for key in known)


def test_a_key_file_is_read(tmp_path, capsys):
    file = tmp_path / "keys"
    file.write_text("\ufeff# two of them\n one \n\ntwo\none\n", encoding="utf-8")
    file.chmod(0o600)
    assert read_keys(file) == ("one", "two") and not capsys.readouterr().out
    file.chmod(0o640)
    assert KeySource(file, ["three", "one"]).read() == ("one", "two", "three")
    said = capsys.readouterr().out
    assert "mode 0640" in said and "one" not in said.replace(str(tmp_path), "").replace("API keys", "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no key in it"),
        (b"# only this\n\n", "no key in it"),
        (b"good\nsecret key\n", "keys:2: a key may have printable ASCII"),
        ("ключ-secret\n".encode(), "keys:1: a key may have printable ASCII"),
        (b"secret\xff\n", "not UTF-8"),
        (b"secret\n" * 200_000, "at most 1,048,576"),
    ],
)
def test_key_files_without_usable_keys_are_refused(tmp_path, content, words):
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read_keys(file)
    assert words in str(refused.value) and "secret" not in str(refused.value)


def test_files_that_are_not_key_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", "."):
        with pytest.raises(ConfigError, match=r"--api-key-file|pipe|missing|folder|directory"):
            read_keys(tmp_path / name)


def test_keys_are_removed_from_the_environment(monkeypatch):
    monkeypatch.setenv(KEYS_VARIABLE, " one,two\nthree ")
    assert take_keys_of_environment() == ("one", "two", "three")
    assert KEYS_VARIABLE not in os.environ and take_keys_of_environment() == ()
    monkeypatch.setenv(KEYS_VARIABLE, " , ")
    with pytest.raises(ConfigError, match="no key in it"):
        take_keys_of_environment()


def test_the_front_gets_the_full_configuration():
    engine, front = EngineConfig(max_batch=3), FrontConfig(openai_port=1, cors_origins=("https://a",))
    config = ServeConfig(
        engine, TritonConfig("repository", models=("m", "m_infer"), settings={"max_batch": 3}), front, 5
    )
    text = json.dumps(config.to_dict())
    assert ServeConfig.from_dict(json.loads(text)) == config and "\n" not in text


def test_limits_of_open_requests_follow_from_the_models():
    assert (ServeConfig().max_open, ServeConfig().max_open_per_client) == (576, 288)
    assert ServeConfig(front=FrontConfig(max_open=100)).max_open_per_client == 100
    small = ServeConfig(EngineConfig(max_batch=2, max_queue=1), front=FrontConfig(max_open_per_client=7))
    assert (small.max_open, small.max_open_per_client) == (38, 7)


def make_certificate(folder, days=365, name="server", *more):
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout", key, "-out",
         certificate, "-days", str(days), "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         *(more or ["-nodes"])],
        check=True, capture_output=True,
    )  # fmt: skip
    key.chmod(0o600)
    return certificate, key


def test_certificates(tmp_path, capsys):
    certificate, key = make_certificate(tmp_path)
    check_certificate(certificate, key)
    assert not capsys.readouterr().out
    key.chmod(0o644)
    check_certificate(certificate, key)
    assert "private key and other users may read it (mode 0644)" in capsys.readouterr().out
    soon, soon_key = make_certificate(tmp_path, 3, "soon")
    check_certificate(soon, soon_key)
    assert "expires in 3 days" in capsys.readouterr().out
    locked = make_certificate(tmp_path, 30, "locked", "-passout", "pass:x")
    for pair, words in (
        ((certificate, soon_key), "not the key of"),
        ((key, key), "not usable|no certificate"),
        ((tmp_path / "none", key), "No such file"),
        (locked, "passphrase"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_certificate(*pair)
