"""Traces as values and as a page: faithful, named by what contains them, safe with hostile texts."""

import base64
import hashlib
import html.parser
import json
import re
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_jax.generate.trace import Trace
from retro_jax.report.escapes import visible
from retro_jax.report.html import page
from retro_jax.report.matching_spans import matching_spans
from retro_jax.report.trace_page import trace_body, trace_page
from retro_jax.report.trace_script import STYLE
from retro_jax.report.trace_value import contains, trace_value, units
from retro_jax.report.views import NeighbourSource, SourceDocument

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\x00\x1b[2J\u202egnol\u2066<!--"
PAD, BOS, HOSTILE_TOKEN, EURO = 0, 1, 2, (3, 4, 5)
M, K, R = 8, 2, 16
ROUND = np.arange(10, 26)  # tokens of one document in a row


class Library:
    """Tokens with names; token 2 is hostile, 3 to 5 are the bytes of one character."""

    def __init__(self, votes: Any = None):
        self._votes = votes

    def piece(self, token: int) -> bytes:
        if token in (PAD, BOS):
            return b""
        if token in EURO:
            return "€".encode()[EURO.index(token)].to_bytes()
        if token == 6:
            return b"a\xe2"
        return HOSTILE.encode() if token == HOSTILE_TOKEN else f" t{token}".encode()

    def label(self, token: int) -> str:
        return "bos" if token == BOS else f"token {token}"

    def document(self, number: int) -> SourceDocument:
        tokens = ROUND if number == 7 else ROUND[::-1]
        return SourceDocument(f"vote {number} {HOSTILE}", "corpus", lambda: tokens)

    def votes(self, before: np.ndarray) -> Any:
        return None if self._votes is None else self._votes(before)


class Votes:
    """Two votes for token 13 of document 6, which does not have it there, and of 7, and one other."""

    length, tokens, documents = 3, np.array([13, 13, 99]), np.array([6, 7, 7])


def make_trace() -> Trace:
    """Three chunks of 8 tokens; chunk 1 repeats ten tokens of its first neighbour."""
    tokens = np.array([BOS, HOSTILE_TOKEN, *EURO, 90, 10, 11, *range(12, 20), 91, 92, 93])
    neighbours = np.full((2, K, R), PAD, np.int32)
    neighbours[0, 0, : len(ROUND)] = ROUND
    neighbours[0, 1, :9] = [50, 16, 17, 18, 19, 51, HOSTILE_TOKEN, 16, 17]
    neighbours[1, 0, :2] = [91, 92]
    draw, n = np.random.default_rng(0), len(tokens)
    effects = draw.normal(size=(n, K)).astype(np.float32)
    effects[:M] = effects[16:, 1] = 0
    effects[8] = 0.004
    attention = draw.random((2, n, K, R)).astype(np.float32)
    attention[:, :M] = 0
    without = -draw.exponential(size=n).astype(np.float32) - 1
    return Trace(
        tokens=tokens.astype(np.int32),
        prompt_length=6,
        log_probabilities=without + effects.sum(axis=1),
        without=without,
        effects=effects,
        neighbours=neighbours,
        attention=attention / np.maximum(attention.sum(axis=(2, 3), keepdims=True), 1e-9),
        chunk_length=M,
        pad_id=PAD,
        layers=(2, 5),
    )


def source(name: str, tokens: np.ndarray) -> NeighbourSource:
    document = SourceDocument(name, f"code {HOSTILE}", lambda: tokens)
    return NeighbourSource(document, 3, 12, 0.25, revision=4)


def make_value(votes: Any = None, **more: Any) -> dict[str, Any]:
    """The value of make_trace; the second neighbour's document lacks what the neighbour has."""
    sources = [
        [source(f"a.py {HOSTILE}", ROUND), source("b.py", np.arange(100, 120))],
        [source("c.py", np.array([91, 92])), None],
    ]
    return trace_value(make_trace(), sources, Library(votes), **more)


class _Page(html.parser.HTMLParser):
    """The tags with their attributes, and the text in each element that has a class."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str, str]] = []  # tag, class, data
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input"):
            self._open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.append((*self._open[-1], data))

    def scripts(self, name: str) -> list[str]:
        return [data for tag, kind, data in self.texts if tag == "script" and kind == name]


def test_a_unit_is_a_token_or_a_whole_character():
    value = make_value()
    texts = [unit["text"] for unit in value["units"]]
    assert texts[:4] == ["bos", HOSTILE, "€", " t90"]
    figures, euro = make_trace(), value["units"][2]
    assert (euro["token"], euro["tokens"]) == (4, 3)
    assert euro["with"] == pytest.approx(figures.log_probabilities[2:5].sum(), abs=1e-4)
    assert [chunk["start"] for chunk in value["chunks"]] == [0, 6, 14]
    cut = [(unit.text, unit.tokens) for unit in units(np.array([3, 4, BOS, 5]), Library())]
    assert cut == [("\ufffd", 2), ("bos", 1), ("\ufffd", 1)]
    left = [(unit.text, unit.tokens) for unit in units(np.array([6, BOS]), Library())]
    assert left == [("a", 1), ("\ufffd", 0), ("bos", 1)]
    json.dumps(value, allow_nan=False)


def test_spans_are_the_longest_and_name_a_document_that_has_them():
    (span,) = make_value()["chunks"][1]["spans"]
    # From the end of the chunk before: 10 .. 15 in chunk 1, and the rest of chunk 1.
    assert span == {
        "start": 6,
        "place": 0,
        "length": 10,
        "neighbour": 0,
        "document": f"a.py {HOSTILE}",
    }
    # Neighbour 2 has four of these tokens too, but its document has not: it is not named.
    assert make_value()["chunks"][2]["spans"] == []


def test_effects_name_who_is_responsible():
    value, figures = make_value(), make_trace()
    for unit in value["units"]:
        effects = figures.effects[unit["token"]]
        wanted = int(np.abs(effects).argmax()) if np.abs(effects).max() >= 0.01 else -1
        assert unit["responsible"] == wanted
    assert value["units"][6]["responsible"] == -1


def test_memory_votes_name_a_document_that_has_ending_and_token():
    def votes(before: np.ndarray) -> Any:
        return Votes() if before[-1] == 12 else None

    with_votes = [unit for unit in make_value(votes)["units"] if "memory" in unit]
    assert [unit["token"] for unit in with_votes] == [9]
    memory = with_votes[0]["memory"]
    assert memory["document"] == f"vote 7 {HOSTILE}"
    assert (memory["length"], memory["votes"]) == (3, 3)
    assert memory["share"] == pytest.approx(2 / 3, abs=1e-4)
    assert [one["text"] for one in memory["next"]] == [" t13", " t99"]


def test_attention_reads_back():
    figures, attention = make_trace(), make_value()["attention"]
    assert figures.attention is not None
    assert attention["layers"] == [2, 5]
    for layer, data in enumerate(attention["data"]):
        shares = np.frombuffer(base64.b64decode(data), np.uint8).reshape(attention["shape"])
        peaks = np.array(attention["peaks"][layer])[:, None, None]
        wanted = figures.attention[layer, attention["first"] :]
        np.testing.assert_allclose(shares / 255 * peaks, wanted, atol=2e-3)


@given(
    st.lists(st.integers(0, 3), max_size=12),
    st.lists(st.integers(0, 3), max_size=12),
    st.integers(1, 4),
)
def test_matching_spans_are_those_of_a_plain_search(text: list[int], other: list[int], least: int):
    found = matching_spans(np.array(text, int), np.array(other, int), least=least, pad_id=0)
    covered = set()
    for span in found:
        run = text[span.start : span.start + span.length]
        assert run == other[span.place : span.place + span.length]
        assert len(run) >= least
        covered |= set(range(span.start, span.start + span.length))
    intervals = [(span.start, span.start + span.length) for span in found]
    assert not any(a != b and b[0] <= a[0] and a[1] <= b[1] for a in intervals for b in intervals)
    wanted = set()
    for i in range(len(text) - least + 1):
        run = text[i : i + least]
        if 0 not in run and any(other[j : j + least] == run for j in range(len(other))):
            wanted |= set(range(i, i + least))
    assert covered == wanted


def test_contains():
    document = np.array([1, 2, 1, 2, 3])
    assert contains(document, np.array([1, 2, 3]))
    assert not contains(document, np.array([2, 2]))
    assert not contains(document[:1], document)


def make_page(**more: Any) -> str:
    """A page in which everything that can be is hostile."""

    def votes(before: np.ndarray) -> Any:
        return Votes() if before[-1] == 12 else None

    value = make_value(votes, heading=HOSTILE, facts=[(HOSTILE, HOSTILE)])
    return trace_page([value], title=HOSTILE, summary=HOSTILE, **more)


def test_hostile_texts_are_shown_and_not_obeyed():
    text = make_page(endpoint=f"/trace{HOSTILE}")
    text.encode()
    parsed = _Page(text)
    names = [tag for tag, _ in parsed.tags]
    assert names.count("script") == 2
    assert not {"img", "iframe", "object", "b<"} & set(names)
    assert all(not name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n"]
    shown = [data for _, kind, data in parsed.texts if kind.startswith("u")]
    assert shown.count(visible(HOSTILE)) == 1
    (data,) = parsed.scripts("values")
    assert not set("<>&") & set(data)
    values = json.loads(data)
    assert values["chunks"][1]["spans"][0]["document"] == visible(f"a.py {HOSTILE}")
    assert values["units"][7]["memory"]["document"] == visible(f"vote 7 {HOSTILE}")
    assert len(values["units"]) == sum(name.get("data-u") is not None for _, name in parsed.tags)


def test_the_page_loads_nothing_and_runs_its_own_script_alone():
    parsed = _Page(make_page())
    for tag, attributes in parsed.tags:
        assert not {"src", "action", "srcdoc"} & set(attributes)
        assert attributes.get("href") in ((None,) if tag != "link" else ("data:,",))
    (policy,) = [a["content"] for _, a in parsed.tags if a.get("http-equiv")]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    (script,) = parsed.scripts("")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert not re.search(r"https?:|url\(|@import", make_page())
    served = _Page(make_page(endpoint="/trace"))
    assert any("connect-src 'self'" in str(a.get("content")) for _, a in served.tags)
    (form,) = [a for tag, a in served.tags if tag == "form"]
    assert form["data-endpoint"] == "/trace"
    fields = {a["name"] for tag, a in served.tags if tag in ("input", "textarea")}
    assert fields == {"prompt", "max_tokens", "temperature", "retrieval", "key"}


def test_tokens_have_the_colour_of_their_change_and_the_line_of_their_span():
    value = make_value()
    for number, change in ((7, 9.0), (8, -9.0), (9, 0.0)):
        value["units"][number] |= {"with": -1.0, "without": -1.0 - change}
    parsed = _Page(trace_body(value))
    classes = {a["data-u"]: a["class"] for _, a in parsed.tags if a.get("data-u")}
    assert classes["7"] == "u r8 copied"
    assert classes["8"] == "u f8 fallen copied"
    assert classes["9"] == "u copied"
    titles = {a["data-u"]: a["title"] for _, a in parsed.tags if a.get("data-u")}
    assert titles["7"] == "-1.00 nats, without retrieval -10.00"
    captions = "".join(data for _, _, data in parsed.texts)
    assert "chunk 3 of 12 · distance 0.250 · revision 4" in captions
    assert trace_body(value).count('<span class="continuation"><span data-t="8"') == 2


def test_a_text_without_retrieval_has_a_page_too():
    figures = make_trace()
    n = len(figures.tokens)
    bare = Trace(
        figures.tokens,
        6,
        figures.without,
        figures.without,
        np.zeros((n, 0)),
        None,
        None,
        M,
        PAD,
        (),
    )
    value = trace_value(bare, [], Library())
    text = trace_body(value)
    assert "19 tokens, without retrieval." in text
    assert "No neighbours: retrieval is off." in text
    assert value["attention"] is None


def test_text_is_readable_on_every_colour():
    """Contrast of at least 4.5, the least of WCAG's level AA, in light and dark."""
    light, dark = re.split(r"prefers-color-scheme: dark", page("", ""), maxsplit=1)
    for base, ours in ((light, STYLE.split("@media")[0]), (dark, STYLE.split("@media")[1])):
        text, ground = (_hex(base, name) for name in ("text", "code"))
        for name in ("rise", "fall", "look"):
            colour = np.array(
                [int(x) for x in re.search(rf"--{name}: (\d+), (\d+), (\d+)", ours).groups()]
            )  # type: ignore[union-attr]
            mixed = 0.85 * colour + 0.15 * ground
            assert _contrast(text, mixed) >= 4.5, name


def _hex(style: str, name: str) -> np.ndarray:
    """A colour of a style sheet."""
    match = re.search(rf"--{name}: #(\w\w)(\w\w)(\w\w)", style)
    assert match is not None
    return np.array([int(part, 16) for part in match.groups()])


def _contrast(one: np.ndarray, other: np.ndarray) -> float:
    """The contrast of two colours as WCAG 2 defines it."""

    def luminance(colour: np.ndarray) -> float:
        share = colour / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
