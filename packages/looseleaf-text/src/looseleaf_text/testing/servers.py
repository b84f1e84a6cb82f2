"""Servers to test optimisers against: of one's own answers, around the toy model, and transformers' own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from looseleaf_text.testing import ToyLanguageModel

Handle = Callable[[str, dict[str, Any], Mapping[str, str]], tuple[int, Any] | None]
"""(path, body, headers) of a request -> status and what is answered as JSON; None: there is no such path."""


@contextlib.contextmanager
def json_server(handle: Handle) -> Iterator[str]:
    """The URL (``.../v1``) of a server in a thread that answers what ``handle`` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = handle(self.path, body, self.headers)  # type: ignore[arg-type]
            if answer is None:
                self.send_error(404)
                return
            raw = json.dumps(answer[1]).encode()
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *arguments: Any) -> None:
            pass

    with _direct():
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def chat_server(answer: Callable[[dict[str, Any], int], tuple[int, str]],
                tokens: int = 7) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of a chat server that does not tokenize, and the requests it got, ``key`` being what they bear.

    Args:
        answer: (request, how many came so far) -> status and text; with another status than 200 the text is the error.
        tokens: said to be used by each answer.
    """
    requests: list[dict[str, Any]] = []
    lock = threading.Lock()

    def handle(path: str, body: dict[str, Any], headers: Mapping[str, str]) -> tuple[int, Any] | None:
        if path != "/v1/chat/completions":
            return None
        with lock:
            requests.append({**body, "key": headers.get("Authorization")})
            status, text = answer(body, len(requests))
        return status, {"choices": [{"message": {"role": "assistant", "content": text}}],
                        "usage": {"total_tokens": tokens}} if status == 200 else {"error": {"message": text}}

    with json_server(handle) as url:
        yield url, requests


@contextlib.contextmanager
def toy_server(*, log_probs: bool = True, embeddings: bool = True) -> Iterator[str]:
    """The URL (``.../v1``) of an OpenAI-compatible server around :class:`ToyLanguageModel`.

    It scores what follows the last space of a prompt, so answers must be one word, as those of ``toy_task`` are.

    Args:
        log_probs: it gives log-probabilities of the prompt.
        embeddings: it has ``/embeddings``.
    """
    toy = ToyLanguageModel()

    def handle(path: str, body: dict[str, Any], headers: Mapping[str, str]) -> tuple[int, Any] | None:
        answer: dict[str, Any] = {"choices": [{"text": ""}]}
        if path == "/v1/embeddings" and embeddings:
            answer = {"data": [{"index": n, "embedding": row.tolist()}
                               for n, row in enumerate(toy.embed(body["input"]))]}
        elif path != "/v1/completions":
            return None
        elif body.get("echo") and log_probs:
            head, _, tail = body["prompt"].rpartition(" ")
            answer["choices"][0]["logprobs"] = {
                "tokens": [head, " " + tail, "."],
                "token_logprobs": [None, toy.score([head], [[" " + tail]])[0][0], -1.0]}
        elif not body.get("logprobs"):
            answer["choices"][0]["text"] = toy.generate(
                [body["prompt"]], body["max_tokens"], None, body.get("temperature", 0), body.get("seed", 0))[0]
        return 200, answer

    with json_server(handle) as url:
        yield url


class TransformersServer:
    """``transformers serve`` on a free port; it can be killed and started again.

    Args:
        folder: of the model and its tokenizer, as ``save_pretrained`` writes them; the log goes there.

    Raises:
        ModuleNotFoundError: it is not installed, or did not start (the message has the end of its log).
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        beside = Path(sys.executable).with_name("transformers")
        command = str(beside) if beside.exists() else shutil.which("transformers")
        try:
            from transformers.utils.import_utils import is_serve_available
        except ImportError:
            command = None
        if command is None or not is_serve_available():
            raise ModuleNotFoundError("transformers serve is not installed: pip install 'transformers[serving]'")
        self.command, self.folder = command, Path(folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self, seconds: float = 180.0) -> None:
        """Start it, and wait until it answers."""
        log = self.folder / "server.log"
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [self.command, "serve", str(self.folder), "--host", "127.0.0.1", "--port", str(self.port), "--device",
                 "cpu", "--dtype", "float32"], stdout=out, stderr=out,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
        until = time.monotonic() + seconds
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            try:
                with opener.open(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                pass
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise ModuleNotFoundError(f"transformers serve did not start: {log.read_text()[-500:]}")
            time.sleep(0.5)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait(20)


@contextlib.contextmanager
def transformers_server(model: Any, tokenizer: Any, folder: str | os.PathLike[str]) -> Iterator[str]:
    """The URL of ``transformers serve`` for a model; at the server its name is ``str(folder)``.

    Args:
        model, tokenizer: a small language model; written to ``folder``.
        folder: an empty one.

    Raises:
        ModuleNotFoundError: see :class:`TransformersServer`.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with _direct():
        server = TransformersServer(folder)
        try:
            yield server.url
        finally:
            server.kill()


@contextlib.contextmanager
def _direct() -> Iterator[None]:
    """Without a proxy between this process and itself."""
    before = os.environ.get("NO_PROXY")
    os.environ["NO_PROXY"] = "127.0.0.1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["NO_PROXY"]
        else:
            os.environ["NO_PROXY"] = before
