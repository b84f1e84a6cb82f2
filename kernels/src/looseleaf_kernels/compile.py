"""Compile every Triton kernel ahead of time, with no GPU: ``python -m looseleaf_kernels.compile --target cuda:90``.

``--out DIR`` keeps the binaries and is laid out as Triton's own cache: ship it and point TRITON_CACHE_DIR at it.
A kernel is looked up there by its source, its constants and the target, so that the versions of Triton must agree.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from looseleaf_kernels.launch import Job
from looseleaf_kernels.operations import operations

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


def main(argv: Sequence[str] | None = None) -> int:
    """Compile for one target and print registers, shared memory and spills of each kernel."""
    parser = argparse.ArgumentParser(prog="python -m looseleaf_kernels.compile", description=__doc__)
    parser.add_argument("--target", required=True, help=f"one of {', '.join(TARGETS)}, or another of these forms")
    parser.add_argument("--out", help="folder of the cache; made if missing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    form = re.fullmatch(r"cuda:(\d+)|hip:(gfx\w+)", arguments.target)
    if not form:
        parser.error(f"--target: expected cuda:<capability> or hip:<gfx name>, such as {', '.join(TARGETS)}, got "
                     f"{arguments.target}")
    if arguments.out:
        os.environ["TRITON_CACHE_DIR"] = str(Path(arguments.out).resolve())
    rows = compile_all(arguments.target, arguments.jobs)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{arguments.target}: {len(rows)} kernels")
        for row in rows:
            print(f"  {row['kernel']:<48} registers {row['registers']:>4}  shared {row['shared']:>7} B  "
                  f"spills {row['spills']}")
    return 0


def compile_all(target: str, processes: int = 1) -> list[dict[str, Any]]:
    """Compile all kernels for ``target``; one row each with registers, shared memory (bytes) and spills.

    Args:
        target: ``cuda:<capability>`` or ``hip:<gfx name>``.
        processes: how many compile side by side; 1: this one alone.
    """
    numbers = range(len(jobs()))
    if processes <= 1:
        return [_compile(target, n) for n in numbers]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(partial(_compile, target), numbers))


def jobs() -> list[Job]:
    """Every kernel of every operation, for each dtype, head size and block size that is compiled ahead of time."""
    modules = dict.fromkeys(op.module("triton") for op in operations() if "triton" in op.implementations)
    return [job for module in modules for job in module.compile_jobs()]


def _compile(target: str, number: int) -> dict[str, Any]:
    """The row of one kernel, by its place among all."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind, _, arch = target.partition(":")
    gpu = GPUTarget(kind, int(arch) if kind == "cuda" else arch, 32 if kind == "cuda" else 64)
    job = jobs()[number]
    names = job.kernel.arg_names
    signature = {n: job.types.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): value for n, value in job.constants.items()}
    # Pointers and most sizes are multiples of 16 in practice; Triton specialises on it when launching.
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in names if signature[n].startswith("*")}
    source = ASTSource(job.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=job.launch(arch).options())
    usage = _nvidia(compiled) if kind == "cuda" else _amd(compiled)
    return {"kernel": job.name, "target": target, "shared": int(compiled.metadata.shared), **usage}


def _nvidia(compiled: Any) -> dict[str, Any]:
    """Registers and spills from the assembled binary, read with the cuobjdump that Triton carries."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return {"registers": None, "spills": None}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, local = re.search(r"REG:(\d+)", text), re.search(r"LOCAL:(\d+)", text)
    return {"registers": int(registers[1]) if registers else None, "spills": int(local[1]) if local else None}


def _amd(compiled: Any) -> dict[str, Any]:
    """Vector registers and spills from the assembly's metadata."""
    text = compiled.asm["amdgcn"]
    registers, spills = re.search(r"\.vgpr_count:\s*(\d+)", text), re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    return {"registers": int(registers[1]) if registers else None, "spills": int(spills[1]) if spills else None}


if __name__ == "__main__":
    sys.exit(main())
