"""Text as it comes: stop strings are held back, characters come whole."""

import itertools

import pytest

from retro_jax.generate.text_stream import TextStream


def pieces(parts: list[str], stop: tuple[str, ...]) -> tuple[list[str], TextStream]:
    """What comes out after each part, and at the end."""
    stream = TextStream(lambda tokens: "".join(parts[token] for token in tokens), stop)
    out = []
    for token in range(len(parts)):
        out.append(stream.push(token))
        if stream.stopped:
            break
    return [*out, stream.finish()], stream


def test_the_worked_trace():
    out, stream = pieces(["a", " E", "N", "s", "END.", "x"], ("END",))
    assert out == ["a", " ", "", "ENs", "", ""]
    assert stream.stopped
    assert stream.text == "a ENs"


@pytest.mark.parametrize(
    "stop", [("END",), ("\n\n",), ("aab", "abc"), ("aaaa",), ("b", "abab"), ("nowhere",), ()]
)
def test_any_cut_of_a_text_gives_the_same(stop: tuple[str, ...]):
    text = "aaab aba\n\nEN ENDaaaab"
    ends = [text.find(one) for one in stop if one in text]
    wanted = text[: min(ends)] if ends else text
    for first, second in itertools.combinations(range(1, len(text)), 2):
        out, stream = pieces([text[:first], text[first:second], text[second:]], stop)
        assert "".join(out) == stream.text == wanted
        assert stream.stopped == bool(ends)


def test_nothing_that_has_come_out_is_taken_back():
    """Every prefix of what comes is a prefix of the whole text, letter by letter."""
    text = "aabaabaac" * 3
    out, _ = pieces(list(text), ("aabaac",))
    assert "".join(out) == text[: text.index("aabaac")]


def test_characters_come_whole():
    raw = "a€😀".encode()
    decode = lambda tokens: bytes(raw[token] for token in tokens).decode(errors="replace")  # noqa: E731
    stream = TextStream(decode)
    assert [stream.push(token) for token in range(len(raw))] == ["a", "", "", "€", "", "", "", "😀"]
    half = TextStream(decode)
    assert [half.push(token) for token in range(3)] == ["a", "", ""]
    assert half.finish() == "\ufffd"
