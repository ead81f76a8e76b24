"""Changes of files, as hypothesis draws them: bytes that go, come or change, and JSON values."""

import json
from typing import Any

from hypothesis import strategies as st

_BYTES = (
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\r\n",
        b"\n\n",
        b"\r",
        b"\x1a",
        b"\xe2\x80\xa8",
    ),
    *(
        b'"',
        b"{}",
        b"[[[[[[[[",
        b"null",
        b"NaN",
        b"1e999",
        b"-1",
        b"99999999999999999999",
        b"\\ud800",
    ),
    *(b" = x = \n", b"\\u0000", b"\xff\xff\xff\xff", b"\x7f", b"<0x00>", b"@", b"%", b"()"),
)
# Kind, place as a share of the file, length as a share of it, and what is put there.
_CHANGE = st.tuples(
    st.sampled_from(("flip", "insert", "remove", "overwrite", "repeat", "cut")),
    st.floats(0, 1),
    st.floats(0, 0.1),
    st.sampled_from(_BYTES) | st.binary(max_size=8),
)
BYTE_CHANGES = st.lists(_CHANGE, min_size=1, max_size=4)

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "", " ", "a\0b", -1, 0, 1, 2**31, 2**63, 2**70, 1e308, "NaN", []])
)
VALUES = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
# A place, as a share of all places in the value; whether it goes; what is put there else.
JSON_CHANGES = st.lists(st.tuples(st.floats(0, 1), st.booleans(), VALUES), min_size=1, max_size=2)


def changed_bytes(data: bytes, changes: list[tuple[str, float, float, bytes]]) -> bytes:
    """The bytes after each change."""
    for kind, place, length, new in changes:
        start = int(place * len(data))
        stop = start + max(1, int(length * len(data)))
        middle = {
            "flip": bytes(byte ^ (new[:1] or b"\1")[0] for byte in data[start : start + 1]),
            "insert": new + data[start : start + 1],
            "remove": b"",
            "overwrite": new,
            "repeat": data[start:stop] * 2,
            "cut": b"",
        }[kind]
        rest = {"flip": start + 1, "insert": start + 1, "overwrite": start + len(new)}
        end = len(data) if kind == "cut" else rest.get(kind, stop)
        data = data[:start] + middle + data[end:]
    return data


def changed_json(value: Any, changes: list[tuple[float, bool, Any]]) -> Any:
    """A copy of a JSON value after each change."""
    value = json.loads(json.dumps(value))
    for share, goes, new in changes:
        places = list(_places(value))
        if not places:
            return new
        parent, key = places[min(int(share * len(places)), len(places) - 1)]
        if goes:
            del parent[key]
        else:
            parent[key] = new
    return value


def _places(value: Any):
    """Every (container, key) of a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
