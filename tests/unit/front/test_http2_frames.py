"""The frames between gRPC clients and the server: independent of how they are cut, and never with too long a message."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.serve.front.grpc.http2_frames import (
    MAX_FRAME,
    PREFACE,
    TOO_LONG,
    ClientFrames,
    ServerFrames,
    Violation,
    make_frame,
    make_window_update,
)

MOST = 1000
DATA, HEADERS, RST, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
HEADER = b"\0\x05x-who\x039.9"


def make_frames(now=lambda: 0.0):
    return ClientFrames(MOST, ("x-who", "9.9"), now)


def make_message(size, length=None):
    return b"\0" + (size if length is None else length).to_bytes(4, "big") + bytes(size)


def parse_frames(data):
    """(kind, flags, stream, payload) of each."""
    found = []
    while data:
        size = int.from_bytes(data[:3], "big")
        assert size <= MAX_FRAME and len(data) >= 9 + size
        found.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + size]))
        data = data[9 + size :]
    return found


def feed_all(client, *pieces):
    return b"".join(client.feed(piece) for piece in pieces)


def cut(data, places):
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


PLACES = st.lists(st.integers(0, 1 << 16), max_size=20)


@given(
    sizes=st.lists(st.lists(st.integers(0, MOST), max_size=4), min_size=1, max_size=4),
    pieces=PLACES,
    places=PLACES,
)
@settings(max_examples=200, deadline=None)
def test_valid_frames_pass(sizes, pieces, places):
    """Messages of several streams, cut into DATA frames anywhere, and these into pieces anywhere."""
    sent, wanted, queues = [PREFACE, make_frame(SETTINGS, 0, 0)], {}, []
    for i, lengths in enumerate(sizes):
        stream = 2 * i + 1
        sent.append(make_frame(HEADERS, 4, stream, b"\x82"))
        wanted[stream] = b"".join(make_message(size) for size in lengths)
        queues.append([(stream, piece) for piece in cut(wanted[stream], pieces)])
    for stream, piece in (one for row in itertools.zip_longest(*queues) for one in row if one):
        sent.append(make_frame(DATA, 0, stream, piece))
    for i in range(len(sizes)):
        sent.append(make_frame(DATA, 1, 2 * i + 1))
    client = make_frames()
    out = feed_all(client, *cut(b"".join(sent), places))
    assert out.startswith(PREFACE)
    got = dict.fromkeys(wanted, b"")
    ended = set()
    for kind, flags, stream, payload in parse_frames(out[len(PREFACE) :]):
        if kind == HEADERS:
            assert payload == b"\x82" + HEADER
        elif kind == DATA:
            assert stream not in ended
            got[stream] += payload
            ended |= {stream} if flags & 1 else set()
    assert got == wanted and ended == set(wanted)
    assert client.pop_window() == 0 and client.find_oldest() is None


@given(before=st.lists(st.integers(0, MOST), max_size=3), length=st.integers(MOST + 1, 2**32 - 1), places=PLACES,
       after=st.integers(0, 4 * MAX_FRAME), pieces=PLACES)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_too_long_message_never_passes(before, length, after, places, pieces):
    """The server gets the messages before it, then the mark; the client's window is restored exactly."""
    whole = b"".join(make_message(size) for size in before)
    content = whole + make_message(after, length)
    sent = [PREFACE, make_frame(HEADERS, 4, 1, b"\x82")]
    for piece in cut(content, pieces):
        sent += [make_frame(DATA, 0, 1, piece[i : i + MAX_FRAME]) for i in range(0, len(piece), MAX_FRAME)]
    client, other = make_frames(), make_frame(HEADERS, 4, 3, b"\x83") + make_frame(DATA, 1, 3, make_message(5))
    out = feed_all(client, *cut(b"".join(sent), places), other)
    data = [
        (flags, payload)
        for kind, flags, stream, payload in parse_frames(out[len(PREFACE) :])
        if (kind, stream) == (DATA, 1)
    ]
    got = b"".join(payload for _, payload in data)
    assert got == whole + b"\0\0\0\0\1" + TOO_LONG
    assert [flags for flags, _ in data] == [0] * (len(data) - 1) + [1]
    assert client.pop_window() == max(0, len(content) - len(got))
    assert out.endswith(make_frame(DATA, 1, 3, make_message(5)))
    dropped = feed_all(client, make_frame(DATA, 0, 1, b"x" * 100), make_frame(DATA, 1, 1, b"x"))
    assert dropped == b"" and client.pop_window() >= 100
    assert feed_all(client, make_frame(RST, 0, 1, b"\0" * 4))


def test_invalid_frames_are_refused():
    for pieces in (
        [b"GET / HTTP/1.1\r\n"],
        [PREFACE[:-1] + b"x"],
        [PREFACE, b"\xff\xff\xff" + b"\0" * 6],
        [PREFACE, make_frame(DATA, 8, 1, b"\0")],
        [PREFACE, make_frame(HEADERS, 4 | 8, 1, b"\0\x82")],
        [PREFACE, make_frame(HEADERS, 4, 0, b"\x82")],
        [PREFACE, make_frame(CONTINUATION, 4, 1, b"\x82")],
        [PREFACE, make_frame(HEADERS, 0, 1, b"\x82"), make_frame(DATA, 0, 1, b"")],
        [PREFACE, make_frame(HEADERS, 0, 1, b"\x82" * 9000), make_frame(CONTINUATION, 0, 1, b"\x82" * 9000)],
        [
            PREFACE,
            *(
                make_frame(HEADERS, 4, i, b"\x82") + make_frame(DATA, 0, i, make_message(0, 9999))
                for i in range(1, 2100, 2)
            ),
        ],
    ):
        with pytest.raises(Violation):
            feed_all(make_frames(), *pieces)


def test_headers_split_over_two_frames():
    out = feed_all(make_frames(), PREFACE, make_frame(HEADERS, 0, 1, b"\x82"), make_frame(CONTINUATION, 4, 1, b"\x84"))
    assert parse_frames(out[len(PREFACE) :]) == [(HEADERS, 0, 1, b"\x82"), (CONTINUATION, 4, 1, b"\x84" + HEADER)]


def test_the_transfer_time_of_a_message_is_measured():
    now = 5.0
    client = ClientFrames(MOST, ("x-who", "9.9"), lambda: now)
    feed_all(
        client,
        PREFACE,
        make_frame(HEADERS, 4, 1, b"\x82"),
        make_frame(HEADERS, 4, 3, b"\x82"),
        make_frame(DATA, 0, 1, b"\0"),
    )
    assert client.find_oldest() == 5.0
    now = 6.0
    feed_all(client, make_frame(DATA, 0, 3, make_message(3, 7)))
    assert client.find_oldest() == 5.0
    feed_all(client, make_frame(DATA, 0, 1, b"\0\0\0\0"))
    assert client.find_oldest() == 6.0
    feed_all(client, make_frame(DATA, 0, 3, b"1234"))
    assert client.find_oldest() is None
    feed_all(client, make_frame(DATA, 0, 3, make_message(3, 7)))
    client.forget(3)
    assert client.find_oldest() is None


@given(payloads=st.lists(st.tuples(st.sampled_from([DATA, HEADERS, SETTINGS, CONTINUATION, RST]), st.binary(max_size=40)),
                         max_size=12), places=PLACES)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_server_frames_pass_unchanged(payloads, places):
    sent = b"".join(
        make_frame(kind, 4 if kind in (HEADERS, CONTINUATION) else 0, 1, payload) for kind, payload in payloads
    )
    server, out = ServerFrames(), b""
    for piece in cut(sent, places):
        passed, ended = server.feed(piece)
        parse_frames(passed)  # whole ones
        assert set(ended) <= {1}
        out += passed
    assert out == sent


def test_no_frame_is_inserted_between_header_frames():
    server = ServerFrames()
    begun = make_frame(SETTINGS, 0, 0) + make_frame(HEADERS, 1, 1, b"x")
    assert server.feed(begun) == (make_frame(SETTINGS, 0, 0), [])
    rest = make_frame(CONTINUATION, 4, 1, b"y")
    assert server.feed(rest) == (make_frame(HEADERS, 1, 1, b"x") + rest, [1])
    assert parse_frames(make_window_update(7)) == [(8, 0, 0, b"\0\0\0\7")]


def test_the_number_of_unacknowledged_pings_and_settings_is_limited():
    client, server = make_frames(), ServerFrames()
    client.feed(PREFACE)
    for kind in (PING, SETTINGS) * 500:  # each is answered before the next
        assert client.feed(make_frame(kind, 0, 0, bytes(8))) == make_frame(kind, 0, 0, bytes(8))
        server.feed(make_frame(kind, 1, 0, bytes(8)))
        client.count_answers(server.pop_answers())
    client.feed(make_frame(PING, 1, 0, bytes(8)) * 5000)  # replies to the server's own
    assert not server.pop_answers()
    with pytest.raises(Violation, match="without waiting"):
        client.feed(make_frame(PING, 0, 0, bytes(8)) * 101)
