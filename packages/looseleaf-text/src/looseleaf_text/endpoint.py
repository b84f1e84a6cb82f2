"""A language model behind an OpenAI-compatible server."""

from __future__ import annotations

import copy
import email.utils
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Literal

import httpx

from looseleaf.errors import EndpointError
from looseleaf_text.logprobs import align, first_table, first_token, span_log_prob
from looseleaf_text.model import LanguageModel, words

if TYPE_CHECKING:
    import numpy as np

Scoring = Literal["auto", "echo", "top", "generate"]
ALTERNATIVES = (20, 5, 2)
"""Likeliest tokens to ask for; the next smaller number where a server refuses one."""
LONGEST_PAUSE = 600.0
"""Seconds a server may ask us to wait; beyond that it is an error."""
MISSING = -30.0
"""Log-probability of a continuation that the server did not generate (``scoring="generate"``)."""

_NO_LOG_PROBS = (
    "the server {url} returns no log-probabilities, which scoring needs. Use a server that gives those of the prompt "
    "(vLLM; llama-cpp-python with --logits_all true) or at least the likeliest next tokens (logprobs), score with a "
    "LocalModel, or give EndpointModel(..., scoring=\"generate\"), which scores the text generated and nothing else")


class EndpointModel(LanguageModel):
    """A model behind a server that speaks the OpenAI protocol: vLLM, ``transformers serve``, llama.cpp and others.

    Requests go out side by side, one prompt each. A request that times out, cannot connect, or fails with 429 or
    5xx is retried with increasing delays (a ``Retry-After`` of the server is respected); other errors are
    raised at once. Safe to use from several threads.

    Should the server die half-way through a call, :class:`looseleaf.EndpointError` is raised; its ``partial``
    holds what came back (None for the rest), and the same call made again asks only for what is missing.

    Scoring, tried in this order where ``scoring="auto"``:

    ``"echo"``
        log-probabilities of the prompt itself: exact, labels of any length, one request per continuation.
    ``"top"``
        the likeliest next tokens: one request per prefix; for continuations told apart by their first token. One
        that is not among them gets the least value listed, which is the most it can be; where none is, it is an error.
    ``"generate"``
        never chosen by itself: what is generated gets 0, any other continuation -30. For accuracy only.

    Args:
        base_url: URL up to and including the version, such as ``"http://localhost:8000/v1"``.
        model: name of the model at the server.
        api_key: key sent as bearer token; None: the environment variable OPENAI_API_KEY when set.
        timeout: seconds until a request is given up; > 0.
        retries: how often a request is retried; >= 0.
        api: ``"completions"`` continues a text; ``"chat"`` sends the prompt as a user message.
        scoring: see above.
        concurrency: concurrent requests; >= 1.
        backoff: seconds before the first retry; doubled each time.
        tokenizer: the model's tokenizer, for servers that do not tokenize.
    """

    def __init__(self, base_url: str, model: str, api_key: str | None = None, timeout: float = 60, retries: int = 3, *,
                 api: Literal["completions", "chat"] = "completions", scoring: Scoring = "auto",
                 concurrency: int = 8, backoff: float = 0.5, tokenizer: Any = None) -> None:
        for name, value, ok, expected in (
                ("base_url", base_url, str(base_url).startswith(("http://", "https://")),
                 "a URL such as 'http://localhost:8000/v1'"),
                ("timeout", timeout, timeout > 0, "seconds > 0"),
                ("retries", retries, retries >= 0, "an integer >= 0"),
                ("api", api, api in ("completions", "chat"), "'completions' or 'chat'"),
                ("scoring", scoring, scoring in ("auto", "echo", "top", "generate"),
                 "'auto', 'echo', 'top' or 'generate'"),
                ("concurrency", concurrency, concurrency >= 1, "an integer >= 1"),
                ("backoff", backoff, backoff >= 0, "seconds >= 0")):
            if not ok:
                raise ValueError(f"EndpointModel.{name}: expected {expected}, got {value!r}")
        self.base_url = base_url.rstrip("/")
        self.model = self.name = model
        self.retries, self.api, self.concurrency, self.backoff = retries, api, concurrency, backoff
        self.scoring: Scoring = scoring
        self.tokenizer = tokenizer
        self.calls = 0
        self.tokens = 0
        self.requests = 0
        key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY")
        self._client = httpx.Client(timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {})
        self._lock = threading.Lock()
        self._kept: dict[Any, Any] = {}
        self._tokenless = False
        self._alternatives = ALTERNATIVES[0]
        self._tokenizing: tuple[str, str, dict[str, Any]] | None = None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __deepcopy__(self, memo: Any) -> EndpointModel:
        """A copy with connections of its own; it knows what this one has learned of the server."""
        made = copy.copy(self)
        made._client = httpx.Client(timeout=self._client.timeout, headers=self._client.headers)
        made._lock, made._kept = threading.Lock(), dict(self._kept)
        return made

    def __enter__(self) -> EndpointModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- requests -------------------------------------------------------------------------------------------------

    def _post(self, path: str, body: dict[str, Any], stop: threading.Event | None = None, *,
              root: bool = False) -> dict[str, Any]:
        base = self.base_url.rsplit("/v1", 1)[0] if root else self.base_url
        url = f"{base}/{path}"
        stop = stop or threading.Event()
        pause, last = self.backoff, ""
        for attempt in range(self.retries + 1):
            with self._lock:
                self.requests += 1
            asked_pause: float | None = None
            try:
                response = self._client.post(url, json=body)
            except httpx.TimeoutException:
                last = f"no answer within {self._client.timeout.read} s"
            except httpx.TransportError as error:
                last = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 429 or response.status_code >= 500:
                    last = f"status {response.status_code}: {_server_message(response)}"
                    asked_pause = _seconds(response.headers.get("retry-after"), response.headers.get("date"))
                    if asked_pause is not None and asked_pause > LONGEST_PAUSE:
                        raise EndpointError(f"{url}: {last}; it asks to wait {asked_pause:.0f} s: try again then")
                elif 300 <= response.status_code < 400:
                    raise EndpointError(f"{url}: status {response.status_code}, moved to "
                                        f"{response.headers.get('location')!r}: give that as base_url")
                elif response.status_code >= 400:
                    raise self._refused(url, response)
                else:
                    try:
                        answer = response.json()
                    except ValueError:
                        raise EndpointError(f"{url} answered with something that is not JSON: "
                                            f"{response.text[:200]!r}. Is base_url right?") from None
                    if not isinstance(answer, dict):
                        raise EndpointError(f"{url} answered {answer!r:.200}, expected an object")
                    return answer
            if attempt < self.retries and stop.wait(pause if asked_pause is None else asked_pause):
                break
            pause *= 2
        raise EndpointError(f"{url} failed {attempt + 1} times, last: {last}. Is the server running, and is timeout="
                            f"{self._client.timeout.read} s enough? A search with a state_dir resumes where it was")

    def _refused(self, url: str, response: httpx.Response) -> EndpointError:
        code = response.status_code
        advice = {
            401: "the key was refused: give api_key or set OPENAI_API_KEY",
            403: "the key may not use this: check its rights",
            404: f"not found: check base_url (it usually ends with /v1) and model={self.model!r}"
                 + ("; a server without text completions needs api=\"chat\"" if self.api == "completions" else ""),
        }.get(code, "the server does not take this request")
        error = EndpointError(f"{url} refuses: status {code}, {advice}. The server said: {_server_message(response)}")
        error.status = code  # type: ignore[attr-defined]
        return error

    def _all(self, kind: str, jobs: Sequence[Any], work: Callable[[Any, threading.Event], Any]) -> list[Any]:
        """``work`` done for every job, side by side; what was done is kept when one fails."""
        out: list[Any] = [None] * len(jobs)
        with self._lock:
            known = {n: self._kept[kind, job] for n, job in enumerate(jobs) if (kind, job) in self._kept}
        for n, value in known.items():
            out[n] = value
        todo = [n for n in range(len(jobs)) if n not in known]
        stop = threading.Event()
        pool = ThreadPoolExecutor(max_workers=min(self.concurrency, max(1, len(todo))))
        futures = {n: pool.submit(work, jobs[n], stop) for n in todo}
        try:
            wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:  # also on Ctrl-C: nothing more is sent
            if not all(f.done() and f.exception() is None for f in futures.values() if not f.cancelled()):
                stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        failed: BaseException | None = None
        for n, future in futures.items():
            if future.cancelled():
                continue
            error = future.exception()
            if error is None:
                out[n] = future.result()
            elif failed is None:
                failed = error
        if failed is None:
            with self._lock:
                for job in jobs:
                    self._kept.pop((kind, job), None)
            return out
        done = [n for n in range(len(jobs)) if out[n] is not None]
        with self._lock:
            self._kept.update({(kind, jobs[n]): out[n] for n in done})
        if not isinstance(failed, EndpointError):
            raise failed
        partial = EndpointError(f"{failed} ({len(done)} of {len(jobs)} requests of this call were answered and are "
                                "kept: the same call asks only for the rest)")
        partial.partial = out  # type: ignore[attr-defined]
        partial.status = getattr(failed, "status", None)  # type: ignore[attr-defined]
        raise partial from failed

    def _count(self, calls: int, tokens: int) -> None:
        with self._lock:
            self.calls += calls
            self.tokens += tokens

    # -- log-likelihood -------------------------------------------------------------------------------------------

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        """See :meth:`LanguageModel.score`, and the class for how.

        Raises:
            EndpointError: the server cannot be reached, refuses, or gives no log-probabilities.
        """
        if len(prefixes) != len(continuations):
            raise ValueError(f"expected one list of continuations for each of {len(prefixes)} prefixes, got "
                             f"{len(continuations)}")
        if any(not row or not all(row) for row in continuations):
            raise ValueError("expected one continuation or more for each prefix, none of them empty, got "
                             f"{continuations}")
        if not prefixes:
            return []
        if self.scoring == "auto":
            self.scoring = self._find_scoring(prefixes[0], continuations[0][0])
        return {"echo": self._score_echo, "top": self._score_top,
                "generate": self._score_generate}[self.scoring](prefixes, continuations)

    def _find_scoring(self, prefix: str, continuation: str) -> Scoring:
        stop = threading.Event()
        refusals: list[str] = []

        def works(ask: Callable[[str, str], Any]) -> bool:
            try:
                return ask(prefix, continuation) is not None
            except EndpointError as error:
                if getattr(error, "status", None) not in (400, 422):
                    raise
                refused = error
            try:  # what is wrong may be this prompt (too long, say), not the question
                able = ask("a", " b") is not None
            except EndpointError as error:
                if getattr(error, "status", None) not in (400, 422):
                    raise
                refusals.append(str(error))
                return False
            if able:
                raise refused
            return False

        if self.api == "completions" and works(lambda p, c: self._echo((p, c), stop)):
            return "echo"
        if works(lambda p, _: self._top(p, stop)):
            return "top"
        raise EndpointError(_NO_LOG_PROBS.format(url=self.base_url) + (f". It refused to: {refusals[-1]}" if refusals
                                                                       else ""))

    def _score_echo(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        jobs = [(p, c) for p, row in zip(prefixes, continuations, strict=True) for c in row]

        def one(job: tuple[str, str], stop: threading.Event) -> tuple[float, int]:
            scored = self._echo(job, stop)
            if scored is None:
                raise EndpointError(_NO_LOG_PROBS.format(url=self.base_url))
            return scored

        results = iter(self._all("echo", jobs, one))
        out = []
        for row in continuations:
            own = [next(results) for _ in row]
            out.append([value for value, _ in own])
            self._count(1, max(tokens for _, tokens in own))
        return out

    def _echo(self, job: tuple[str, str], stop: threading.Event) -> tuple[float, int] | None:
        prefix, continuation = job
        # One token is generated and left out again: some servers read max_tokens=0 as "no limit".
        answer = self._post("completions", {"model": self.model, "prompt": prefix + continuation, "max_tokens": 1,
                                            "temperature": 0.0, "echo": True, "logprobs": 1}, stop)
        log_probs = _choice(answer).get("logprobs") or {}
        tokens, values = log_probs.get("tokens") or [], log_probs.get("token_logprobs") or []
        value = span_log_prob(tokens, values, prefix, continuation)
        if value is None:
            if align("".join(tokens), prefix + continuation) is None:  # it does not echo
                return None
            raise EndpointError(f"the server {self.base_url} echoes {prefix + continuation!r:.100} without the "
                                f"log-probabilities of {continuation!r}: expected {len(tokens)} numbers, "
                                f"got {len(values)}, {sum(v is None for v in values)} of them null")
        used = (answer.get("usage") or {}).get("prompt_tokens") or _guess(prefix + continuation)
        return self._finite(value, prefix), int(used)

    def _finite(self, value: float, prefix: str) -> float:
        if not math.isfinite(value):
            raise EndpointError(f"the server {self.base_url} gives {value} as a log-probability after {prefix!r:.100}: "
                                f"a weight of {self.model} is NaN or infinite, or its dtype overflows there")
        return value

    def _score_top(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        def one(prefix: str, stop: threading.Event) -> tuple[dict[str, float], int]:
            listed = self._top(prefix, stop)
            if listed is None:
                raise EndpointError(_NO_LOG_PROBS.format(url=self.base_url))
            return listed

        out = []
        # Spaces at the end of a prefix are part of the next token.
        bare = [p.rstrip(" ") for p in prefixes]
        moved = [[p[len(b):] + c for c in row] for p, b, row in zip(prefixes, bare, continuations, strict=True)]
        for prefix, (table, tokens), row in zip(bare, self._all("top", bare, one), moved, strict=True):
            firsts = [first_token(c, table, strip=self.api == "chat") for c in row]
            named = [f for f in firsts if f is not None]
            if len(set(named)) < len(named):
                raise EndpointError(f"the continuations {row} begin with the same token, and the server {self.base_url}"
                                    " gives log-probabilities of the next token only: choose labels that begin "
                                    "differently, or a server that gives log-probabilities of the prompt")
            if not named:
                raise EndpointError(f"none of the continuations {row} begins with one of the {len(table)} likeliest "
                                    f"tokens {sorted(table, key=lambda t: -table[t])[:8]} after {prefix!r:.100}, and "
                                    f"the server {self.base_url} lists no more: word the prompt so that one of them is "
                                    "likely, or use a server that gives log-probabilities of the prompt")
            least = self._finite(min(table.values()), prefix)
            if any(table[f] == least for f in named):  # one that is listed comes before one that is not
                least = math.nextafter(least, -math.inf)
            out.append([least if f is None else self._finite(table[f], prefix) for f in firsts])
            self._count(1, tokens)
        return out

    def _top(self, prefix: str, stop: threading.Event) -> tuple[dict[str, float], int] | None:
        def ask(count: int) -> dict[str, Any]:
            common = {"model": self.model, "max_tokens": 1, "temperature": 0.0}
            if self.api == "chat":
                return self._post("chat/completions", {**common, "messages": [{"role": "user", "content": prefix}],
                                                       "logprobs": True, "top_logprobs": count}, stop)
            return self._post("completions", {**common, "prompt": prefix, "logprobs": count}, stop)

        refused: EndpointError | None = None
        for count in (n for n in ALTERNATIVES if n <= self._alternatives):
            try:
                answer = ask(count)
            except EndpointError as error:
                if getattr(error, "status", None) not in (400, 422):
                    raise
                refused = refused or error
                continue
            self._alternatives = count
            break
        else:
            assert refused is not None
            raise refused
        table = first_table(_choice(answer).get("logprobs"))
        if not table:
            return None
        return table, int((answer.get("usage") or {}).get("prompt_tokens") or _guess(prefix))

    def _score_generate(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        longest = max(len(c) for row in continuations for c in row)
        texts = self.generate(prefixes, max(4, longest // 2), stop=["\n\n"])
        out = []
        for text, row in zip(texts, continuations, strict=True):
            answer = text.strip().casefold()
            hits = [c for c in row if answer.startswith(c.strip().casefold())]
            best = max(hits, key=len) if hits else None
            out.append([0.0 if c == best else MISSING for c in row])
        return out

    # -- generation and embeddings --------------------------------------------------------------------------------

    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None,
                 temperature: float = 0.0, seed: int = 0) -> list[str]:
        """See :meth:`LanguageModel.generate`; whether ``seed`` is respected is up to the server."""
        from looseleaf_text.local import cut

        if max_tokens < 1 or temperature < 0:
            raise ValueError("generate: expected max_tokens >= 1 and temperature >= 0, got "
                             f"max_tokens={max_tokens!r}, temperature={temperature!r}")
        common: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": temperature,
                                  "seed": seed}
        if stop:
            common["stop"] = stop[:4]  # the protocol's own maximum; the rest is cut below

        def one(prompt: str, event: threading.Event) -> tuple[str, int]:
            if self.api == "chat":
                answer = self._post("chat/completions",
                                    {**common, "messages": [{"role": "user", "content": prompt}]}, event)
                text = (_choice(answer).get("message") or {}).get("content") or ""
            else:
                answer = self._post("completions", {**common, "prompt": prompt}, event)
                text = _choice(answer).get("text") or ""
            usage = answer.get("usage") or {}
            return text, int(usage.get("total_tokens") or _guess(prompt + text))

        kind = f"generate {max_tokens} {stop} {temperature} {seed}"
        out = []
        for text, tokens in self._all(kind, prompts, one):
            self._count(1, tokens)
            out.append(cut(text, stop))
        return out

    def embed(self, texts: list[str]) -> np.ndarray:
        """See :meth:`LanguageModel.embed`; by the server's ``/embeddings``."""
        import numpy as np

        if not texts:
            return np.zeros((0, 0), dtype=np.float32)
        answer = self._post("embeddings", {"model": self.model, "input": texts})
        data = sorted(answer.get("data") or [], key=lambda d: d.get("index", 0))
        if len(data) != len(texts):
            raise EndpointError(f"{self.base_url}/embeddings returned {len(data)} vectors for {len(texts)} texts")
        usage = answer.get("usage") or {}
        self._count(len(texts), int(usage.get("prompt_tokens") or sum(map(_guess, texts))))
        vectors = np.asarray([d["embedding"] for d in data], dtype=np.float32)
        for text, vector in zip(texts, vectors, strict=True):
            if not np.isfinite(vector).all():
                raise EndpointError(f"{self.base_url}/embeddings gives NaN or infinite numbers for {text!r:.100}: a "
                                    f"weight of {self.model} is NaN or infinite, or its dtype overflows there")
        return vectors

    # -- tokens ---------------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """See :meth:`LanguageModel.tokenize`: by ``tokenizer`` when given, else by the server.

        Raises:
            EndpointError: the server does not tokenize.
        """
        if self.tokenizer is not None:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ways: list[tuple[str, str, dict[str, Any]]] = [
            ("tokenize", "detokenize", {"model": self.model, "prompt": text, "content": text,
                                        "add_special_tokens": False, "add_special": False}),
            ("extras/tokenize", "extras/detokenize", {"model": self.model, "input": text})]
        if self._tokenless:
            ways = []
        for way in [self._tokenizing] if self._tokenizing else ways:
            path, back, _ = way
            body = next(w[2] for w in ways if w[0] == path)
            try:
                answer = self._post(path, body, root=True)
                ids = [int(t) for t in answer["tokens"]]
            except (EndpointError, KeyError, TypeError, ValueError) as error:
                if isinstance(error, EndpointError) and getattr(error, "status", None) is None:
                    raise
                continue
            self._tokenizing = (path, back, {})
            return ids
        self._tokenless = True
        raise EndpointError(f"the server {self.base_url} does not tokenize: "
                            "give EndpointModel(..., tokenizer=...) the model's tokenizer")

    def detokenize(self, ids: list[int]) -> str:
        """See :meth:`LanguageModel.detokenize`."""
        if self.tokenizer is not None:
            return str(self.tokenizer.decode(ids))
        if self._tokenizing is None:
            self.tokenize("a")
        assert self._tokenizing is not None
        answer = self._post(self._tokenizing[1], {"model": self.model, "tokens": list(ids)}, root=True)
        for name in ("prompt", "content", "text"):
            if name in answer:
                return str(answer[name])
        raise EndpointError(f"{self.base_url}: {self._tokenizing[1]} returned {sorted(answer)}, expected a text")

    def token_texts(self, text: str) -> list[str]:
        """See :meth:`LanguageModel.token_texts`; words, where neither server nor ``tokenizer`` can tell."""
        try:
            return super().token_texts(text)
        except EndpointError:
            return words(text)

    def count_tokens(self, text: str) -> int:
        """See :meth:`LanguageModel.count_tokens`; a quarter of the characters where it is unknown."""
        try:
            return len(self.tokenize(text))
        except EndpointError:
            return _guess(text)


def _choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices") or []
    if not choices or not isinstance(choices[0], dict):
        raise EndpointError(f"the server answered without choices: {answer!r:.200}")
    return choices[0]


def _server_message(response: httpx.Response) -> str:
    try:
        data = response.json()
        error = next((data[name] for name in ("error", "detail", "message") if data.get(name)), data)
        return str(error.get("message") or error if isinstance(error, dict) else error)[:300]
    except (ValueError, AttributeError):
        return response.text[:300] or "nothing"


def _seconds(value: str | None, now: str | None = None) -> float | None:
    """A Retry-After in seconds: it is a number, or a date, which counts from the server's own (``now``)."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(value).timestamp()
            seconds = until - (email.utils.parsedate_to_datetime(now).timestamp() if now else time.time())
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _guess(text: str) -> int:
    return len(text) // 4 + 1
