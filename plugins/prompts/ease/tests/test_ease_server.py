"""EASE through servers that speak the OpenAI protocol."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from looseleaf import EndpointError, EndpointModel, LocalModel
from looseleaf.testing.prompts import ToyLanguageModel, toy_task
from looseleaf_ease import EASE

SMALL: dict[str, Any] = {"k": 2, "total_iterations": 6, "n_init": 3, "domain": 50, "keep": 4, "hidden": 8,
                         "train_steps": 10, "target": 2.0}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, Any]]]:
    """The URL of a server with the kit's toy model, and what it can do."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    toy = ToyLanguageModel()
    can = {"log_probs": True, "embeddings": True}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer: dict[str, Any] = {"choices": [{"text": ""}]}
            if self.path == "/v1/embeddings" and can["embeddings"]:
                answer = {"data": [{"index": n, "embedding": row.tolist()}
                                   for n, row in enumerate(toy.embed(body["input"]))]}
            elif self.path != "/v1/completions":
                self.send_error(404)
                return
            elif body.get("echo") and can["log_probs"]:
                head, _, tail = body["prompt"].rpartition(" ")
                answer["choices"][0]["logprobs"] = {
                    "tokens": [head, " " + tail, "."],
                    "token_logprobs": [None, toy.score([head], [[" " + tail]])[0][0], -1.0]}
            elif not body.get("logprobs"):
                answer["choices"][0]["text"] = toy.generate([body["prompt"]], 4)[0]
            raw = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", can
    finally:
        server.shutdown()
        server.server_close()


def test_through_a_server_as_without_one(served: tuple[str, dict[str, Any]]) -> None:
    task = toy_task(size=6)
    local = EASE(**SMALL, encoder="model").optimize(task, ToyLanguageModel(), progress=False)
    remote = EASE(**SMALL, encoder="model").optimize(task, EndpointModel(served[0], "toy"), progress=False)
    assert [e.text for e in remote.exemplars] == [e.text for e in local.exemplars]
    for ours, theirs in zip(local.info["tried"], remote.info["tried"], strict=True):
        assert ours[2:] == theirs[2:] and ours[:2] == pytest.approx(theirs[:2])
    assert remote.info["fitness"] == local.info["fitness"]


def test_a_server_without_embeddings(served: tuple[str, dict[str, Any]]) -> None:
    served[1]["embeddings"] = False
    model = EndpointModel(served[0], "toy", retries=0)
    with pytest.raises(EndpointError, match=r"(?s)status 404.*give EASE another encoder, such as encoder='minilm'"):
        EASE(**SMALL, encoder="model").optimize(toy_task(size=6), model, progress=False)
    prompt = EASE(**SMALL, encoder=ToyLanguageModel().embed).optimize(toy_task(size=6), model, progress=False)
    assert prompt.info["evaluations"] == 6


def test_a_server_without_log_probabilities(served: tuple[str, dict[str, Any]]) -> None:
    served[1]["log_probs"] = False
    task = toy_task(size=6)
    with pytest.raises(EndpointError, match=r'returns no log-probabilities.*scoring="generate"'):
        EASE(**SMALL, encoder="model").optimize(task, EndpointModel(served[0], "toy"), progress=False)
    by_text = EASE(**SMALL, encoder="model").optimize(
        task, EndpointModel(served[0], "toy", scoring="generate"), progress=False)
    assert by_text.info["evaluations"] == 6 and 0 <= by_text.info["fitness"] <= 1


@pytest.mark.slow
def test_through_a_real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``transformers serve`` gives no log-probabilities and has no embeddings: what it generates is marked."""
    pytest.importorskip("transformers")
    from transformers.utils import import_utils

    from looseleaf.testing.probes import tiny_text_llama, tiny_tokenizer

    command = str(Path(sys.executable).with_name("transformers"))
    if not getattr(import_utils, "is_serve_available", bool)() or not (shutil.which(command)):
        pytest.skip("transformers serve is not installed: pip install 'transformers[serving]'")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model, tokenizer = tiny_text_llama().eval(), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [command, "serve", str(tmp_path), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
             "--dtype", "float32"], stdout=out, stderr=out,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    try:
        remote = EndpointModel(f"http://127.0.0.1:{port}/v1", str(tmp_path), concurrency=2, retries=0)
        until = time.monotonic() + 180
        while True:
            try:
                remote.generate(["a"], 1)
                break
            except EndpointError:
                if process.poll() is not None or time.monotonic() > until:
                    pytest.skip(f"transformers serve did not start: {log.read_text()[-500:]}")
                time.sleep(1)
        task = toy_task(size=3, generation=True)
        # The server cannot stop at a text that its little tokenizer has no token for.
        task.max_tokens, task.template, task.stop = 4, "{text}", ()
        search = EASE(**{**SMALL, "total_iterations": 4}, encoder=_lengths)
        found = search.optimize(task, remote, progress=False)
        here = search.optimize(task, LocalModel(model, tokenizer), progress=False)
        assert found.info["evaluations"] == 4
        assert [t[0::2] for t in found.info["tried"]] == [t[0::2] for t in here.info["tried"]]
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _lengths(texts: list[str]) -> np.ndarray:
    return np.array([[len(t), t.count(" ") + 1] for t in texts], dtype=np.float32)


def test_on_a_local_model_that_embeds() -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    from looseleaf.testing.probes import tiny_text_llama, tiny_tokenizer

    task = toy_task(size=6)
    task.template = "{text}"
    model = LocalModel(tiny_text_llama().eval(), tiny_tokenizer())
    prompt = EASE(**SMALL, encoder="model").optimize(task, model, progress=False)
    assert prompt.info["evaluations"] == 6 and task.evaluate(prompt, model, task.dev).score == prompt.info["fitness"]
    assert model.forwarded < model.tokens  # the exemplars are forwarded once for all validation examples
