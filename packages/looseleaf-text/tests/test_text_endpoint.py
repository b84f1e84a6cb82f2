"""EndpointModel against a server that does what servers do on a bad day."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from looseleaf import Budget, EndpointError
from looseleaf_text import EndpointModel
from looseleaf_text.endpoint import _seconds
from looseleaf_text.logprobs import first_token, plain_tokens, span_log_prob
from looseleaf_text.testing import ToyLanguageModel, toy_task

Answer = tuple[int, Any, dict[str, str]]
TOY = ToyLanguageModel()


class Server:
    """A server in a thread; ``behave`` may answer a request in place of the sound behaviour."""

    def __init__(self) -> None:
        self.behave: Callable[[int, str, dict[str, Any]], Answer | None] = lambda n, path, body: None
        self.features = {"echo", "top", "tokenize"}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, body))
                    outer.keys.append(self.headers.get("Authorization"))
                    number = len(outer.requests)
                answer = outer.behave(number, self.path, body) or outer.sound(self.path, body)
                status, data, headers = answer
                if status == 0:  # hang up without a word
                    self.connection.close()
                    return
                raw = data if isinstance(data, bytes) else json.dumps(data).encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up waiting, as it should

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def sound(self, path: str, body: dict[str, Any]) -> Answer:
        if path == "/tokenize" and "tokenize" in self.features:
            return 200, {"tokens": [ord(c) for c in body["prompt"]]}, {}
        if path == "/detokenize" and "tokenize" in self.features:
            return 200, {"prompt": "".join(map(chr, body["tokens"]))}, {}
        if path == "/v1/embeddings":
            data = [{"index": n, "embedding": [float(len(t)), 1.0]} for n, t in enumerate(body["input"])]
            return 200, {"data": data[::-1]}, {}
        if path == "/v1/chat/completions":
            choice: dict[str, Any] = {"message": {"content": "said: " + body["messages"][0]["content"]}}
            if body.get("logprobs") and "top" in self.features:
                choice["logprobs"] = {"content": [{"top_logprobs": [
                    {"token": "positive", "logprob": -0.5}, {"token": "neg", "logprob": -1.5}]}]}
            return 200, {"choices": [choice], "usage": {"prompt_tokens": 5, "total_tokens": 7}}, {}
        if path == "/v1/completions":
            return 200, self.completion(body), {}
        return 404, {"error": {"message": "no such page"}}, {}

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        log_probs: dict[str, Any] | None = None
        text = " positive and so on"
        if body.get("echo") and "echo" in self.features:
            head, _, tail = prompt.rpartition(" ")
            value = TOY.score([head], [[" " + tail]])[0][0]
            log_probs = {"tokens": ["<s>", head, " " + tail, "!"], "token_logprobs": [None, -3.0, value, -9.0]}
            text = prompt + "!"
        elif body.get("logprobs") and "top" in self.features and not body.get("echo"):
            log_probs = {"tokens": [" positive"], "token_logprobs": [-0.5],
                         "top_logprobs": [{" positive": -0.5, " neg": -1.5, " the": -4.0}]}
        return {"choices": [{"text": text, "logprobs": log_probs}], "usage": {"prompt_tokens": 4, "total_tokens": 6}}

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def connect(server: Server, **more: Any) -> EndpointModel:
    return EndpointModel(server.url, "toy", **{"backoff": 0.01, "timeout": 5, **more})


PREFIXES = ["a lovely film", "a dull film"]
LABELS = [[" positive", " negative"]] * 2


def test_echo_gives_the_log_probabilities_of_the_continuations(server: Server) -> None:
    model = connect(server)
    assert model.score(PREFIXES, LABELS) == TOY.score(PREFIXES, LABELS)
    assert model.scoring == "echo"
    assert (model.calls, model.tokens) == (2, 8)


def test_top_log_probabilities_where_there_is_no_echo(server: Server) -> None:
    server.features.discard("echo")
    model = connect(server)
    got = model.score(["a"], [[" positive", " negative", " unheard"]])
    assert got == [[-0.5, -1.5, -4.0]] and model.scoring == "top"
    with pytest.raises(EndpointError, match="begin with the same token"):
        model.score(["a"], [[" positive", " positively"]])


def test_completions_with_log_probabilities_in_the_form_of_chats(server: Server) -> None:
    def behave(number: int, path: str, body: dict[str, Any]) -> Answer:
        top = [{"token": " positive", "logprob": -0.5}, {"token": " neg", "logprob": -1.5}]
        return 200, {"choices": [{"text": " positive", "logprobs": {"content": [
            {"token": " positive", "logprob": -0.5, "top_logprobs": top}]}}]}, {}

    server.behave = behave
    assert connect(server).score(["a"], [[" positive", " negative"]]) == [[-0.5, -1.5]]


def test_fewer_likely_tokens_where_the_server_allows_five(server: Server) -> None:
    server.features.discard("echo")
    server.behave = lambda n, path, body: (
        (400, {"error": {"message": "at most 5"}}, {}) if body.get("logprobs") == 20 else None)
    assert connect(server).score(["a"], [[" positive", " negative"]]) == [[-0.5, -1.5]]


def test_chat_scores_by_the_first_token_of_the_answer(server: Server) -> None:
    model = connect(server, api="chat")
    assert model.score(["a"], [[" positive", " negative"]]) == [[-0.5, -1.5]]
    assert model.generate(["hello"], 5) == ["said: hello"]
    assert set(server.paths()) == {"/v1/chat/completions"}


def test_a_server_without_log_probabilities_is_an_error_that_says_what_to_do(server: Server) -> None:
    server.features -= {"echo", "top"}
    with pytest.raises(EndpointError, match=r'no log-probabilities.*vLLM.*scoring="generate"'):
        connect(server).score(PREFIXES, LABELS)
    model = connect(server, scoring="generate")
    assert model.score(PREFIXES, LABELS) == [[0.0, -30.0]] * 2


def test_429_is_repeated_and_retry_after_heeded(server: Server) -> None:
    server.behave = lambda n, path, body: (429, {"error": "slow down"}, {"Retry-After": "0.3"}) if n == 1 else None
    began = time.monotonic()
    assert connect(server).generate(["x"], 5) == [" positive and so on"]
    assert time.monotonic() - began >= 0.3 and len(server.requests) == 2


def test_500s_are_repeated_then_reported(server: Server) -> None:
    server.behave = lambda n, path, body: (500, b"kaput", {}) if n <= 2 else None
    assert connect(server).generate(["x"], 5)
    server.behave = lambda n, path, body: (503, {"error": {"message": "overloaded"}}, {})
    with pytest.raises(EndpointError, match=r"failed 3 times.*503: overloaded"):
        connect(server, retries=2).generate(["x"], 5)


def test_time_outs_are_repeated(server: Server) -> None:
    def slow(number: int, path: str, body: dict[str, Any]) -> None:
        if number == 1:
            time.sleep(0.6)

    server.behave = slow
    assert connect(server, timeout=0.2).generate(["x"], 5)
    assert len(server.requests) == 2


@pytest.mark.parametrize(("status", "advice"), [(401, "api_key"), (403, "rights"), (404, "base_url")])
def test_refusals_are_not_repeated(server: Server, status: int, advice: str) -> None:
    server.behave = lambda n, path, body: (status, {"error": {"message": "go away"}}, {})
    with pytest.raises(EndpointError, match=f"{advice}.*go away") as caught:
        connect(server, api_key="secret-key").generate(["x"], 5)
    assert len(server.requests) == 1 and server.keys == ["Bearer secret-key"]
    assert "secret-key" not in str(caught.value)


def test_a_server_that_dies_half_way_keeps_what_was_done(server: Server) -> None:
    prompts = [f"prompt {n}" for n in range(10)]
    server.behave = lambda n, path, body: (0, b"", {}) if n > 4 else None
    model = connect(server, retries=1, concurrency=1)
    with pytest.raises(EndpointError, match="4 of 10 requests of this call were answered and are kept") as caught:
        model.generate(prompts, 5)
    partial = caught.value.partial  # type: ignore[attr-defined]
    assert [p is not None for p in partial] == [True] * 4 + [False] * 6
    server.behave = lambda n, path, body: None
    before = len(server.requests)
    assert len(model.generate(prompts, 5)) == 10
    assert len(server.requests) - before == 6
    assert model.calls == 10


def test_nobody_listening(server: Server) -> None:
    url = server.url
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(EndpointError, match=r"failed 2 times.*Is the server running"):
        EndpointModel(url, "toy", retries=1, backoff=0.01).generate(["x"], 5)


def test_answers_that_are_none(server: Server) -> None:
    server.behave = lambda n, path, body: (200, b"<html>", {})
    with pytest.raises(EndpointError, match=r"not JSON.*Is base_url right"):
        connect(server).generate(["x"], 5)
    server.behave = lambda n, path, body: (200, {"choices": []}, {})
    with pytest.raises(EndpointError, match="without choices"):
        connect(server).generate(["x"], 5)


def test_several_threads(server: Server) -> None:
    model = connect(server)
    out: list[Any] = []
    threads = [threading.Thread(target=lambda: out.append(model.score(PREFIXES, LABELS))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(out) == 6 and all(o == TOY.score(PREFIXES, LABELS) for o in out)
    assert model.calls == 12


def test_a_copy_has_connections_of_its_own(server: Server) -> None:
    model = EndpointModel(server.url, "toy", api_key="secret")
    copied = copy.deepcopy(model)
    model.close()
    assert copied.generate(["a b"], 2) and copied.calls == 1 and model.calls == 0
    copied.close()


def test_tokens_by_the_server_or_words(server: Server) -> None:
    assert connect(server).token_texts("a bc") == ["a", " ", "b", "c"]
    server.features.discard("tokenize")
    model = connect(server)
    assert model.token_texts("a bc") == ["a", " bc"]
    with pytest.raises(EndpointError, match=r"tokenizer="):
        model.tokenize("a")
    budget = Budget(tokens=50)
    budget.meter(model).generate(["some prompt"], 5)
    assert 0 < budget.used["tokens"] <= 50


def test_embeddings_in_order(server: Server) -> None:
    np.testing.assert_array_equal(connect(server).embed(["a", "abc"]), [[1, 1], [3, 1]])


def test_stop_texts_beyond_the_protocols_four(server: Server) -> None:
    assert connect(server).generate(["x"], 9, stop=["1", "2", "3", "4", " so"]) == [" positive and"]
    assert server.requests[0][1]["stop"] == ["1", "2", "3", "4"]


def test_a_task_is_evaluated_through_a_server(server: Server) -> None:
    from looseleaf_text import TextPrompt

    task = toy_task()
    prompt = TextPrompt.for_task(task, "Say what it is.")
    assert task.evaluate(prompt.on(connect(server))).scores == task.evaluate(prompt.on(ToyLanguageModel())).scores


def test_spans() -> None:
    assert span_log_prob(["<s>", "ab", " c", "d", "x"], [None, -1, -2, -3, -9], "ab", " cd") == -5
    assert span_log_prob(["ab", " c", "d"], [None, -2, -3], "ab ", "cd") == -5
    assert span_log_prob(["zz"], [-1.0], "ab", " c") is None
    assert first_token(" negative", {" neg": -1.0, " n": -2.0, " ": -0.1}) == " neg"


@pytest.mark.parametrize("wrong", [
    {"timeout": 0}, {"retries": -1}, {"concurrency": 0}, {"api": "rest"}, {"scoring": "guess"}, {"backoff": -1}])
def test_bad_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"EndpointModel.{next(iter(wrong))}: expected .*, got"):
        EndpointModel("http://x/v1", "m", **wrong)
    with pytest.raises(ValueError, match="base_url"):
        EndpointModel("localhost:8000", "m")


# ---------------------------------------------------------------------- what servers write, refuse and ask for
def chat_logprobs(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"top_logprobs": list(entries)}]}}]}


@pytest.mark.parametrize("listed", [
    {"\u0120positive": -3.0, "\u0120negative": -0.1, "\u0120the": -4.0},
    {"\u2581positive": -3.0, "\u2581negative": -0.1, "\u2581the": -4.0},
    {" positive": -3.0, " negative": -0.1, " the": -4.0}])
def test_spellings_of_spaces(server: Server, listed: dict[str, float]) -> None:
    answer = {"choices": [{"text": "x", "logprobs": {"top_logprobs": [listed]}}]}
    server.behave = lambda n, path, body: (200, answer, {})
    assert connect(server, scoring="top").score(["a"], [[" positive", " negative"]]) == [[-3.0, -0.1]]
    assert connect(server, scoring="top").score(["a "], [["positive", "negative"]]) == [[-3.0, -0.1]]


def test_byte_level_spellings_of_whole_words() -> None:
    assert plain_tokens(["\u0120caf\u00c3\u00a9", "\u010a", "\u00c3"]) == [" caf\u00e9", "\n", "\udcc3"]
    assert plain_tokens(["\u2581caf\u00e9", "<0x0A>", "<0xC3>"]) == [" caf\u00e9", "\n", "\udcc3"]
    assert plain_tokens([" caf\u00e9"]) == [" caf\u00e9"]


def test_a_label_whose_first_character_is_several_tokens(server: Server) -> None:
    face = "\U0001f60a".encode()
    answer = chat_logprobs({"token": "\ufffd", "bytes": list(face[:2]), "logprob": -0.2},
                           {"token": "no", "bytes": None, "logprob": -2.0})
    server.behave = lambda n, path, body: (200, answer, {})
    assert connect(server, api="chat").score(["a"], [["\U0001f60a", "no"]]) == [[-0.2, -2.0]]


def test_labels_absent_from_the_top_list(server: Server) -> None:
    server.features.discard("echo")
    model = connect(server)
    with pytest.raises(EndpointError, match=r"none of the continuations .* likeliest tokens \[' positive'.* after 'a'"):
        model.score(["a"], [[" yes", " no"]])
    (listed, absent), = model.score(["a"], [[" the", " zebra"]])
    assert listed == -4.0 > absent, "one that is not listed comes after the last that is"


def test_a_chat_server_that_lists_few_alternatives(server: Server) -> None:
    def behave(n: int, path: str, body: dict[str, Any]) -> Answer | None:
        if body["top_logprobs"] > 5:
            return 400, {"error": {"message": "top_logprobs must be at most 5"}}, {}
        return None

    server.behave = behave
    model = connect(server, api="chat")
    assert model.score(["a", "b"], [[" positive", " negative"]] * 2) == [[-0.5, -1.5]] * 2
    before = len(server.requests)
    model.score(["a", "b"], [[" positive", " negative"]] * 2)
    assert len(server.requests) - before == 2, "what it allows is remembered"


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("scoring", ["auto", "top"])
def test_a_refusal_of_one_prompt_is_told_in_the_servers_words(server: Server, api: Any, scoring: Any) -> None:
    def behave(n: int, path: str, body: dict[str, Any]) -> Answer | None:
        text = body.get("prompt") or body["messages"][0]["content"]
        if len(text) > 50:
            return 400, {"error": {"message": "maximum context length is 50 tokens"}}, {}
        return None

    server.behave = behave
    with pytest.raises(EndpointError, match="The server said: maximum context length is 50 tokens"):
        connect(server, api=api, scoring=scoring).score(["long " * 20], [[" positive", " negative"]])
    model = connect(server, api=api, scoring=scoring)
    model.score(["short"], [[" positive", " negative"]])
    with pytest.raises(EndpointError, match="The server said: maximum context length is 50 tokens"):
        model.score(["short", "long " * 20], [[" positive", " negative"]] * 2)


def test_a_server_that_refuses_to_give_log_probabilities_is_quoted(server: Server) -> None:
    server.behave = lambda n, path, body: (
        (422, {"detail": [{"msg": "logprobs are switched off"}]}, {}) if body.get("logprobs") else None)
    with pytest.raises(EndpointError, match=r"no log-probabilities.*logprobs are switched off"):
        connect(server).score(["a"], [[" positive", " negative"]])


@pytest.mark.parametrize("body", [{"error": "slow down"}, {"message": "slow down"}, {"detail": "slow down"},
                                  {"error": {"message": "slow down"}}, b"slow down", [{"msg": "slow down"}]])
def test_what_the_server_said_in_any_form(server: Server, body: Any) -> None:
    server.behave = lambda n, path, _: (400, body, {})
    with pytest.raises(EndpointError, match=r"The server said: .*slow down"):
        connect(server).generate(["x"], 5)


@pytest.mark.parametrize("clock", [0, 3600])
def test_retry_after_as_a_date(server: Server, clock: int) -> None:
    """It counts from the server's own clock."""
    import email.utils

    now = time.time() + clock
    then, now_there = (email.utils.formatdate(t, usegmt=True) for t in (now + 2, now))
    assert _seconds(then, now_there) == 2.0
    assert _seconds(email.utils.formatdate(time.time() + 4, usegmt=True)) == pytest.approx(4, abs=1.5)
    assert _seconds("7") == 7.0 and _seconds("soon") is None and _seconds("nan") is None and _seconds("-3") == 0.0


def test_a_server_that_asks_to_wait_for_an_hour_is_not_waited_for(server: Server) -> None:
    server.behave = lambda n, path, body: (429, {"error": "quota"}, {"Retry-After": "3600"})
    with pytest.raises(EndpointError, match="429: quota; it asks to wait 3600 s"):
        connect(server).generate(["x"], 5)
    assert len(server.requests) == 1


@pytest.mark.parametrize("cut", [1, 2, 4], ids=["one token", "two", "a token each byte"])
def test_echo_of_characters_of_several_tokens(server: Server, cut: int) -> None:
    def behave(n: int, path: str, body: dict[str, Any]) -> Answer:
        tokens = [t for c in body["prompt"] for t in (["\ufffd"] * cut if ord(c) > 0xffff and cut > 1 else [c])]
        log_probs = {"tokens": ["<s>", *tokens, "!"], "token_logprobs": [None, *[-1.0] * len(tokens), -9.0]}
        return 200, {"choices": [{"text": body["prompt"] + "!", "logprobs": log_probs}]}, {}

    server.behave = behave
    model = connect(server)
    assert model.score(["I like it. So:"], [[" yes"]]) == [[-4.0]]
    assert model.score(["I like it \U0001f60a. So:"], [[" yes"]]) == [[-4.0]]
    assert model.score(["\U0001f60a\U0001f60a So:"], [[" yes"]]) == [[-4.0]]
    assert model.score(["So:"], [[" \U0001f60a"]]) == [[-1.0 - cut]]
    assert model.score(["So: \U0001f60a"], [["\U0001f60a"]]) == [[-float(cut)]]


def test_numbers_of_a_server_that_are_none(server: Server) -> None:
    def behave(n: int, path: str, body: dict[str, Any]) -> Answer:
        return 200, b'{"choices": [{"text": "x", "logprobs": {"top_logprobs": [{" a": NaN, " b": -1.0}]}}]}', {}

    server.behave = behave
    with pytest.raises(EndpointError, match="gives nan as a log-probability after 'p': a weight of toy"):
        connect(server, scoring="top").score(["p"], [[" a", " b"]])
    server.behave = lambda n, path, body: (200, b'{"data": [{"index": 0, "embedding": [NaN, 1.0]}]}', {})
    with pytest.raises(EndpointError, match="NaN or infinite numbers for 'p'"):
        connect(server).embed(["p"])


def test_a_server_that_has_moved(server: Server) -> None:
    server.behave = lambda n, path, body: (308, b"", {"Location": "https://elsewhere/v1/completions"})
    with pytest.raises(EndpointError, match="status 308, moved to 'https://elsewhere/v1/completions'"):
        connect(server).generate(["x"], 5)
