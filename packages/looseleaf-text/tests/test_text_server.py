"""EndpointModel against a real server: ``transformers serve`` with a tiny model made here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from looseleaf import Budget, EndpointError
from looseleaf_text import EndpointModel, LocalModel, TextPrompt
from looseleaf_text.testing import toy_task
from looseleaf_text.testing.models import letters_model
from looseleaf_text.testing.servers import TransformersServer

transformers = pytest.importorskip("transformers")


def _tiny(folder: Path) -> tuple[Any, Any]:
    model, tokenizer = letters_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def _serve(folder: Path) -> TransformersServer:
    try:
        return TransformersServer(folder)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, LocalModel]]:
    """URL, model name at the server, and the same model here."""
    folder = tmp_path_factory.mktemp("served")
    model, tokenizer = _tiny(folder)
    server = _serve(folder)
    try:
        yield server.url, str(folder), LocalModel(model, tokenizer)
    finally:
        server.kill()


@pytest.fixture
def remote(served: tuple[str, str, LocalModel], monkeypatch: pytest.MonkeyPatch) -> EndpointModel:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return EndpointModel(served[0], served[1], concurrency=2, backoff=0.05)


@pytest.mark.slow
def test_a_real_server_generates_what_the_model_generates(served: tuple[str, str, LocalModel],
                                                          remote: EndpointModel) -> None:
    prompts = ["good film", "I was bored", "the plot"]
    assert remote.generate(prompts, 12) == served[2].generate(prompts, 12)
    assert remote.calls == 3 and remote.tokens == sum(map(len, prompts)) + 36


@pytest.mark.slow
def test_a_real_server_without_log_probabilities(remote: EndpointModel) -> None:
    with pytest.raises(EndpointError, match=r'returns no log-probabilities.*scoring="generate"'):
        remote.score(["a"], [[" x", " y"]])
    assert remote.token_texts("a bc") == ["a", " bc"]  # and no tokenizer either: words


@pytest.mark.slow
def test_a_task_through_a_real_server(served: tuple[str, str, LocalModel], remote: EndpointModel) -> None:
    task = toy_task(size=4, generation=True)
    prompt = TextPrompt.for_task(task)
    budget = Budget(calls=4)
    scores = task.evaluate(prompt.on(budget.meter(remote))).scores
    assert scores == task.evaluate(prompt.on(served[2])).scores and budget.used["calls"] == 4
    by_text = EndpointModel(served[0], served[1], scoring="generate")
    assert task.labels is None and by_text.score(["good film"], [[" x", " y"]]) == [[-30.0, -30.0]]


@pytest.mark.slow
def test_a_wrong_model_name_is_reported(served: tuple[str, str, LocalModel],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    wrong = EndpointModel(served[0], "no-such-model", retries=0)
    with pytest.raises(EndpointError, match=r"no-such-model|status|failed"):
        wrong.generate(["x"], 3)


@pytest.mark.slow
def test_a_real_server_that_is_too_slow(served: tuple[str, str, LocalModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hasty = EndpointModel(served[0], served[1], timeout=0.002, retries=2, backoff=0.01)
    with pytest.raises(EndpointError, match=r"failed 3 times, last: no answer within 0\.002 s"):
        hasty.generate(["good film"], 200)
    assert hasty.requests == 3


@pytest.mark.slow
def test_a_real_server_that_is_killed_half_way_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model, tokenizer = _tiny(tmp_path)
    server = _serve(tmp_path)
    prompts = [f"prompt {n}" for n in range(8)]
    remote = EndpointModel(server.url, str(tmp_path), concurrency=1, retries=1, backoff=0.05)
    send, sent = remote._post, []

    def post(*given: Any, **more: Any) -> dict[str, Any]:
        sent.append(given)
        if len(sent) == 4:
            server.kill()
        return send(*given, **more)

    monkeypatch.setattr(remote, "_post", post)
    try:
        with pytest.raises(EndpointError, match="3 of 8 requests of this call were answered and are kept") as caught:
            remote.generate(prompts, 5)
        assert [p is not None for p in caught.value.partial] == [True] * 3 + [False] * 5  # type: ignore[attr-defined]
        server.start()
        before = len(sent)
        assert remote.generate(prompts, 5) == LocalModel(model, tokenizer).generate(prompts, 5)
        assert len(sent) - before == 5, "only what was missing is asked for"
    finally:
        server.kill()


@pytest.mark.slow
def test_a_wrong_key_in_front_of_a_real_server(served: tuple[str, str, LocalModel],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Gate(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != "Bearer right":
                status, answer = 401, b'{"error": {"message": "Incorrect API key provided"}}'
            else:
                passed = httpx.post(served[0].removesuffix("/v1") + self.path, content=body, timeout=60,
                                    headers={"Content-Type": "application/json"}, trust_env=False)
                status, answer = passed.status_code, passed.content
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *given: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Gate) as gate:
        threading.Thread(target=gate.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{gate.server_port}/v1"
        wrong = EndpointModel(url, served[1], api_key="wrong")
        with pytest.raises(EndpointError, match="the key was refused: give api_key or set OPENAI_API_KEY"):
            wrong.generate(["good film"], 3)
        assert wrong.requests == 1, "a refusal is not repeated"
        right = EndpointModel(url, served[1], api_key="right")
        assert right.generate(["good film"], 3) == served[2].generate(["good film"], 3)
        gate.shutdown()
