"""EndpointModel against a real server: ``transformers serve`` with a tiny model made here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from looseleaf import Budget, EndpointError, EndpointModel, LocalModel, Prompt
from looseleaf.prompts.model import MeteredModel
from looseleaf.testing.prompts import toy_task

transformers = pytest.importorskip("transformers")


def _command() -> str | None:
    beside = Path(sys.executable).with_name("transformers")
    return str(beside) if beside.exists() else shutil.which("transformers")


def _tiny(folder: Path) -> tuple[Any, Any]:
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(c): c - 29 for c in range(32, 127)},
                                       "\n": 98}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    made.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>",
                                                     eos_token="</s>")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, LocalModel]]:
    """URL, model name at the server, and the same model here."""
    try:
        from transformers.utils.import_utils import is_serve_available
    except ImportError:
        pytest.skip("this transformers has no server")
    command = _command()
    if command is None or not is_serve_available():
        pytest.skip("transformers serve is not installed: pip install 'transformers[serving]'")
    folder = tmp_path_factory.mktemp("served")
    model, tokenizer = _tiny(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [command, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
             "--dtype", "float32"], stdout=out, stderr=out,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 180
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > until:
                pytest.skip(f"transformers serve did not start: {log.read_text()[-500:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(folder), LocalModel(model, tokenizer)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


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
    prompt = Prompt.for_task(task)
    budget = Budget(calls=4)
    marks = task.evaluate(prompt, MeteredModel(remote, budget)).marks
    assert marks == task.evaluate(prompt, served[2]).marks and budget.used["calls"] == 4
    by_text = EndpointModel(served[0], served[1], scoring="generate")
    assert task.labels is None and by_text.score(["good film"], [[" x", " y"]]) == [[-30.0, -30.0]]


@pytest.mark.slow
def test_a_wrong_model_name_is_reported(served: tuple[str, str, LocalModel],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    wrong = EndpointModel(served[0], "no-such-model", retries=0)
    with pytest.raises(EndpointError, match=r"no-such-model|status|failed"):
        wrong.generate(["x"], 3)
