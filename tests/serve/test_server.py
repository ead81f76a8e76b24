"""The server over HTTP: its answers, its errors by field, clients that vanish, revisions, limits."""

import contextlib
import json
import re
import threading
import time

import httpx2
import openai
import pytest

from retro_jax.errors import UserError
from retro_jax.generate.live_database import Retrieval
from retro_jax.generate.sampling import SamplingConfig
from retro_jax.report.escapes import escape, visible
from retro_jax.serve import completions
from retro_jax.serve.app import Server
from retro_jax.serve.limits import Limits
from tests.serve.fakes import HOSTILE, make_generator
from tests.serve.served import listening

LIMITS = Limits(rows=4, length=400, queue=6, seconds=30, body=20_000, strides=(4,))
GREEDY = {"prompt": "hello", "max_tokens": 30, "temperature": 0}


def change(corpus, append, remove):
    """A change of documents that makes one more revision."""
    if remove == ["fake/none"]:
        raise UserError("there is no document 'none': expected another")
    make_generator().databases.last += 1
    return [f"{len(append)} to {corpus}"]


@pytest.fixture(scope="module", name="server")
def _server():
    """A server, not yet running, that only a key opens."""
    return Server(make_generator(), LIMITS, api_key="key", change=change, poll=0.05)


@pytest.fixture(scope="module", name="url")
def _url(server):
    """Where it listens."""
    with listening(server) as url:
        yield url


@pytest.fixture(scope="module", name="client")
def _client(url):
    """The openai package, as it comes."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0)


@pytest.fixture(scope="module", name="http")
def _http(url):
    """A client that sends anything."""
    headers = {"Authorization": "Bearer key"}
    with httpx2.Client(base_url=url, headers=headers, timeout=30) as http:
        yield http


def expected(prompt: str, **settings) -> str:
    """The text of a prompt from Python."""
    sampling = SamplingConfig(**{"max_tokens": 30, "temperature": 0} | settings)
    return make_generator().generate([prompt], sampling)[0].text


def settled(server) -> None:
    """Waits until no text is under way."""
    end = time.monotonic() + 10
    while server.engine.under_way or server.engine.waiting:
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_openai_package_gets_texts_and_streams(client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == "letters"
    answer = client.completions.create(model=model.id, **GREEDY, n=2, echo=True, logprobs=2)
    for choice in answer.choices:
        assert choice.text == "hello" + expected("hello")
        assert choice.finish_reason == "length"
        logprobs = choice.logprobs
        assert "".join(logprobs.tokens) == choice.text
        assert logprobs.text_offset == list(range(len(choice.text)))
        assert logprobs.token_logprobs[-1] == pytest.approx(
            max(logprobs.top_logprobs[-1].values()), abs=1e-5
        )
    assert answer.usage.completion_tokens == 60 and answer.usage.prompt_tokens == 5
    assert answer.retrieval == {"revision": 0, "database": "hash of 0"}
    assert {place["document"] for place in answer.choices[0].neighbours[0]} == {"d"}
    stream = client.completions.create(
        model=model.id, **GREEDY, stream=True, stream_options={"include_usage": True}
    )
    *events, usage = stream
    assert "".join(event.choices[0].text for event in events) == expected("hello")
    assert len(events) == 30 and usage.usage.total_tokens == 35
    assert [event.choices[0].finish_reason for event in events[-2:]] == [None, "length"]


def test_settings_are_those_of_python(client):
    create = lambda **more: client.completions.create(model="letters", **GREEDY | more)  # noqa: E731
    text = expected("hello")
    stop = text[5:8]
    answer = create(stop=stop).choices[0]
    assert (answer.text, answer.finish_reason) == (text[: text.index(stop)], "stop")
    seeded = create(temperature=1.0, seed=5, top_p=0.9, n=2)
    again = create(temperature=1.0, seed=5, top_p=0.9)
    assert seeded.choices[0].text == again.choices[0].text != seeded.choices[1].text
    assert seeded.choices[0].text == expected("hello", temperature=1.0, seed=5, top_p=0.9)
    both = create(prompt=["ab", "hello"])
    assert [choice.text for choice in both.choices] == [expected("ab"), text]
    tokens = make_generator().encode("hello")
    assert create(prompt=tokens).choices[0].text == create(prompt=tokens[1:]).choices[0].text
    off = create(extra_body={"retrieval": False})
    assert off.retrieval is None and off.choices[0].neighbours == []


def test_echo_scores_a_prompt_as_python_does(client):
    """As lm-eval asks: the prompt's log-probabilities, and one token that it throws away."""
    prompt = "the quick brown fox jumps over the lazy dog"
    (scored,) = make_generator().score([prompt])
    for settings in ({"prompt": prompt}, {"prompt": make_generator().encode(prompt)}):
        answer = client.completions.create(
            model="letters", **settings, max_tokens=1, echo=True, logprobs=1, temperature=0
        )
        values = answer.choices[0].logprobs.token_logprobs[:-1]
        assert values[-len(prompt) :] == pytest.approx(scored.log_probabilities.tolist(), abs=1e-5)
    assert values[0] is None  # bos, which was given
    only = client.completions.create(
        model="letters", prompt=prompt, max_tokens=0, echo=True, logprobs=1
    )
    assert only.choices[0].logprobs.token_logprobs == pytest.approx(
        scored.log_probabilities.tolist(), abs=1e-5
    )


LONG = "a" * 500
WRONG = [
    ({}, 400, "prompt"),
    ({"prompt": 5}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [3, 99]}, 400, "prompt"),
    ({"prompt": LONG}, 400, "prompt"),
    ({"prompt": LONG[:300], "max_tokens": 200}, 400, "max_tokens"),
    ({"prompt": "a", "max_tokens": "5"}, 400, "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature"),
    ({"prompt": "a", "stop": ["a", ""]}, 400, "stop"),
    ({"prompt": "a", "stop": 5}, 400, "stop"),
    ({"prompt": "a", "n": 5}, 400, "n"),
    ({"prompt": "a", "logprobs": 6}, 400, "logprobs"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"prompt": "a", "best_of": 3}, 400, "best_of"),
    ({"prompt": "a", "chat": 1}, 400, "chat"),
    ({"prompt": "a", "model": "\ud800"}, 404, "model"),
    ({"prompt": "a\ud800"}, 400, "prompt"),
    ({"prompt": "a", "retrieval": 3}, 400, "retrieval"),
    ({"prompt": "a", "retrieval": {"k": 3}}, 400, "retrieval.k"),
    ({"prompt": "a", "retrieval": {"revision": 99}}, 404, "retrieval.revision"),
    ({"prompt": "zzzzzzzzzzzz", "stream": False}, 400, "retrieval"),
]


def test_errors_name_the_field(http, client):
    for body, status, param in WRONG:
        answer = http.post(
            "/v1/completions",
            content=json.dumps(body),
            headers={"Content-Type": "application/json"},
        )
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param), (body, answer.text)
        assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt", prompt="a")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_what_is_no_request_is_refused(http, url):
    json_type = {"Content-Type": "application/json"}
    for content in (
        b"{bad",
        b"\xff\xfe",
        b"[" * 15_000,
        b'{"prompt": "a", "temperature": NaN}',
        b"",
    ):
        answer = http.post("/v1/completions", content=content, headers=json_type)
        assert answer.status_code == 400 and answer.json()["error"]["message"], content
    many = (b" " * 1000 for _ in range(30))
    for large in ({"content": b" " * 30_000}, {"content": many}):
        answer = http.post("/v1/completions", headers=json_type, **large)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert http.post("/v1/completions", content='{"prompt": "a"}').status_code == 400
    assert http.get("/v1/completions").status_code == 405
    assert http.get("/nowhere").json()["error"]["code"] is None
    for header in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer k\u00e9y"}):
        encoded = {name: value.encode() for name, value in header.items()}
        answer = httpx2.post(f"{url}/v1/completions", json=GREEDY, headers=encoded)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx2.get(f"{url}/health").json() == {"status": "ok"}


def cancelled(http) -> float:
    """How many texts ended because their client had gone."""
    found = re.search(
        r'^retro_texts_total{ended="cancelled"} (.+)$', http.get("/metrics").text, re.M
    )
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_row(http, server, stream, monkeypatch):
    """Tried again where the whole answer was faster than the client's going."""
    monkeypatch.setattr(completions, "_POLL", 0.002)
    body = {"prompt": "hello", "max_tokens": 390, "stream": stream}
    before = cancelled(http)
    for _ in range(20):
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with contextlib.suppress(httpx2.ReadTimeout):
                http.post("/v1/completions", json=body | {"n": 4}, timeout=0.01)
        settled(server)
        if cancelled(http) > before:
            return
    raise AssertionError("no text was cancelled in 20 tries")


def test_limits_of_queue_and_time(http, server):
    """Ten requests of four samples for four rows and six places."""
    body = GREEDY | {"n": 4, "max_tokens": 200}
    answers: list = []
    threads = [
        threading.Thread(target=lambda: answers.append(http.post("/v1/completions", json=body)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(answer.status_code for answer in answers)
    assert set(codes) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "queue_full" and refused.headers["Retry-After"]
    texts = {c["text"] for a in answers if a.status_code == 200 for c in a.json()["choices"]}
    assert texts == {expected("hello", max_tokens=200)}
    assert http.post(
        "/v1/completions", json=GREEDY | {"n": 4, "prompt": ["a", "b"]}
    ).status_code == (400)
    limits = server.service.limits
    try:
        server.service.limits = Limits(rows=4, length=400, seconds=1e-6)
        late = http.post("/v1/completions", json=GREEDY)
        streamed = http.post("/v1/completions", json=GREEDY | {"stream": True})
    finally:
        server.service.limits = limits
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    assert json.loads(streamed.text.removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_new_revision_is_taken_up_while_others_go_on(http, server):
    databases = make_generator().databases
    body = GREEDY | {"max_tokens": 300, "stream": True}
    old = expected("hello", max_tokens=300)
    with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        added = {"append": [{"id": "x", "text": "y"}], "corpus": "news"}
        made = http.post("/documents", json=added).json()
        assert (made["revision"], made["report"]) == (1, ["1 to news"])
        new = http.post("/v1/completions", json=body | {"stream": False}).json()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert {event["retrieval"]["revision"] for event in [first, *events]} == {0}
    assert "".join(e["choices"][0]["text"] for e in [first, *events]) == old
    assert new["retrieval"]["revision"] == 1
    assert new["choices"][0]["text"] != old
    pinned = body | {"stream": False, "retrieval": {"revision": 0, "k": 2}}
    assert http.post("/v1/completions", json=pinned).json()["choices"][0]["text"] == old
    databases.last, databases.first = 2, 1  # published by another process; the oldest is gone
    end = time.monotonic() + 5
    while http.get("/v1/models").json()["data"][0]["retrieval"]["revision"] != 2:
        assert time.monotonic() < end
    gone = http.post("/v1/completions", json=pinned)
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "retrieval.revision")
    assert "retro_database_revision 2.0" in http.get("/metrics").text
    none = http.post("/documents", json={"remove": ["fake/none"]})
    assert (none.status_code, none.json()["error"]["param"]) == (400, "remove")
    assert http.post("/documents", json={}).json()["error"]["param"] == "append"
    found = http.post("/retrieve", json={"text": "hello there", "k": 3}).json()
    assert (found["revision"], [len(chunk) for chunk in found["chunks"]]) == (2, [3, 3])
    assert found["chunks"][0][0].keys() >= {"document", "corpus", "place", "score", "text"}
    assert http.post("/retrieve", json={"text": LONG}).json()["error"]["param"] == "text"


def test_the_page_traces_what_is_typed_beside_other_requests(http, url, server):
    """Hostile texts and names are shown and not obeyed; the revision is named; others are as alone."""
    page = httpx2.get(url)  # without a key
    assert page.headers["Content-Type"].startswith("text/html")
    assert 'data-endpoint="/trace"' in page.text
    asked = {"prompt": HOSTILE, "max_tokens": 20, "temperature": 0}
    refused = httpx2.post(f"{url}/trace", json=asked)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    body, answers = GREEDY | {"max_tokens": 300}, []
    send = lambda: answers.append(http.post("/v1/completions", json=body))  # noqa: E731
    thread = threading.Thread(target=send)
    thread.start()
    answer = http.post("/trace", json=asked).json()
    thread.join()
    assert answers[0].json()["choices"][0]["text"] == expected("hello", max_tokens=300)
    revision = make_generator().databases.newest().revision
    assert answer["retrieval"] == {"revision": revision, "database": f"hash of {revision}"}
    html = answer["html"]
    shown = visible(HOSTILE)
    assert escape(f"d {HOSTILE}") in html and "<img" not in html and html.count("<script") == 1
    assert not set("\x00\x1b\u202e\u2066") & set(html) and escape(HOSTILE) in html
    values = json.loads(html.partition('class="values">')[2].partition("</script>")[0])
    complete = (len(HOSTILE) + 1) // 8
    assert len(values["units"]) == len(HOSTILE) + 21 and len(values["chunks"]) > complete > 1
    assert any(unit["effects"] != [0, 0] for unit in values["units"]), shown
    off = http.post("/trace", json=asked | {"retrieval": False}).json()
    assert off["retrieval"] is None and "retrieval is off" in off["html"]
    one = http.post("/trace", json=asked | {"retrieval": {"k": 1, "exclude": ["fake/d"]}})
    assert one.status_code == 200
    for wrong, status, param in (
        ({"prompt": LONG}, 400, "prompt"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": "5"}, 400, "max_tokens"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({"retrieval": {"revision": 99}}, 404, "retrieval.revision"),
        ({"retrieval": {"tokens": True}}, 400, "retrieval.tokens"),
        ({"html": 1}, 400, "html"),
        ({"prompt": "z" * 12}, 400, "retrieval"),
    ):
        content = json.dumps(asked | wrong)
        headers = {"Content-Type": "application/json"}
        answer = http.post("/trace", content=content, headers=headers)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param), (wrong, answer.text)
    limits = server.service.limits
    try:
        server.service.limits = Limits(rows=4, length=400, seconds=1e-6)
        late = http.post("/trace", json=asked)
    finally:
        server.service.limits = limits
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    with contextlib.suppress(httpx2.ReadTimeout):
        http.post("/trace", json=asked | {"max_tokens": 300}, timeout=0.05)
    settled(server)
    assert http.post("/trace", json=asked).status_code == 200


def test_retrieval_by_fields_of_the_request(http):
    """Documents left out, a stride, and the token memory: as Python's `Retrieval`."""
    generator = make_generator()
    ask = lambda **fields: http.post(  # noqa: E731
        "/v1/completions", json=GREEDY | {"retrieval": fields, "logprobs": 0}
    ).json()["choices"][0]
    plain = ask()
    for fields in ({"exclude": ["fake/d"]}, {"stride": 4}, {"tokens": True}):
        choice = ask(**fields)
        sampling = SamplingConfig(max_tokens=30, temperature=0)
        (result,) = generator.generate(["hello"], sampling, retrieval=Retrieval(**fields))
        assert choice["text"] == result.text
        scores = choice["logprobs"]["token_logprobs"]
        assert scores == pytest.approx(result.log_probabilities.tolist(), abs=1e-5)
        assert scores != pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-5)
        if "stride" in fields:
            # Of the tokens but the last, whose neighbours nothing reads.
            assert len(choice["neighbours"]) == (len(result.tokens) + 5) // 4 - 1
    for retrieval, param in (
        ({"exclude": ["fake/none"]}, "retrieval.exclude"),
        ({"exclude": ["none"]}, "retrieval.exclude"),
        ({"stride": 3}, "retrieval.stride"),
        ({"stride": 2}, "retrieval.stride"),
        ({"k": 0, "stride": 4}, "retrieval.stride"),
        ({"tokens": "yes"}, "retrieval.tokens"),
    ):
        wrong = http.post("/v1/completions", json=GREEDY | {"retrieval": retrieval}).json()
        error = wrong["error"]
        assert error["param"] == param and "expected" in error["message"], (retrieval, wrong)
        assert "/home/me" not in error["message"]
    scored = GREEDY | {"retrieval": {"stride": 4}, "echo": True, "logprobs": 0}
    wrong = http.post("/v1/completions", json=scored).json()["error"]
    assert wrong["param"] == "retrieval.stride" and "echo" in wrong["message"]


def test_tokens_for_clients_that_count_them(http):
    info = http.get("/tokenizer_info").json()
    encode = lambda text: http.post("/tokenize", json={"prompt": text}).json()["tokens"]  # noqa: E731
    assert encode(info["bos_token"]) == [1] and encode(info["eos_token"]) == [2]
    text = http.post("/detokenize", json={"tokens": encode("hello you")}).json()["prompt"]
    assert text == "hello you"
    assert http.post("/detokenize", json={"tokens": [99]}).json()["error"]["param"] == "tokens"


def test_a_server_that_stops_finishes_what_runs():
    """Others are refused; without --documents nothing is changed."""
    server = Server(make_generator(), LIMITS)
    body = GREEDY | {"max_tokens": 300}
    answers: list = []
    with listening(server) as url:
        refused = httpx2.post(f"{url}/documents", json={"remove": ["a/b"]})
        assert refused.json()["error"]["code"] == "documents_refused"
        send = lambda: answers.append(httpx2.post(f"{url}/v1/completions", json=body, timeout=30))  # noqa: E731
        thread = threading.Thread(target=send)
        thread.start()
        while not server.engine.under_way:
            time.sleep(0.001)
    thread.join()
    assert answers[0].json()["choices"][0]["text"] == expected("hello", max_tokens=300)
    assert not server.engine.alive
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url)
