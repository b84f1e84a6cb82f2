"""The Triton kernels of quantised attention: under the interpreter everywhere, on a GPU where there is one."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run(script: str, **environment: str) -> None:
    """Run in a process of its own: Triton reads its environment when imported."""
    tests = os.path.dirname(__file__)
    script = f"import sys\nsys.path.insert(0, {tests!r})\n{script}\nprint('agrees')"
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "agrees"


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETER = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


@needs_triton
def test_attention_under_the_interpreter() -> None:
    run("""
import torch
import quantized_checks as t
import test_quantized_attention as a
# Where bits are 16 there is no bf16: the interpreter multiplies it as if it were uint16.
t.check_attention(a.CASES[0], torch.bfloat16, 4)
t.check_attention(a.CASES[1], torch.bfloat16, 8)
t.check_attention(a.CASES[2], torch.float16, 16)
t.check_attention(a.CASES[3], torch.float16, 8, smooth=False)
for bits in a.BITS:
    t.check_attention(a.CASES[4], torch.float32, bits)
    t.check_attention(a.CASES[5], torch.float32, bits)
a.test_empty_rows_give_zero_and_minus_infinity("triton")
a.test_large_logits("triton")
a.test_lengths_and_nan_in_padding("triton", True)
a.test_nan_in_a_valid_row_is_not_hidden("triton")
""", **INTERPRETER)


@needs_triton
def test_quantiser_under_the_interpreter() -> None:
    run("""
import quantized_checks as t
import test_quantized_attention as a
for number, case in enumerate(a.CASES):
    t.check_quantiser(case, t.DTYPES[number % 3], 8, smooth=number != 3)
    t.check_quantiser(case, t.DTYPES[(number + 1) % 3], (4, 16)[number % 2])
t.check_edges_of_the_quantiser()
""", **INTERPRETER)


KERNEL, SHARED = "looseleaf_kernels.quantized.triton", "looseleaf_kernels.tiles"
MUTATIONS = {
    "rounds at 0.55": (KERNEL, "p * inverse + 0.5)", "p * inverse + 0.45)"),
    "cuts P off": (KERNEL, "p * inverse + 0.5)", "p * inverse)"),
    "scale of P too small": (KERNEL, "tl.div_rn(most, p_largest) * v_scale",
                             "tl.div_rn(most, p_largest + 0.1) * v_scale"),
    "forgets a maximum": (KERNEL, "acc = acc * shrink[:, None]", "acc = acc"),
    "hides the diagonal": (KERNEL, "keys[None, :] <= position", "keys[None, :] < position"),
    "forgets the mean": (KERNEL, "LN_2 + taken", "LN_2"),
    "forgets the former sum": (SHARED, "total * shrink + tl.sum(p, 1)", "total + tl.sum(p, 1)"),
    "drops a channel of the queries": (SHARED, "(d < D)[None, :], other=0)", "(d < D - 1)[None, :], other=0)"),
}


@needs_triton
def test_a_wrong_kernel_is_beyond_the_bound(tmp_path: Path) -> None:
    for number, (module, old, new) in enumerate(MUTATIONS.values()):
        text = Path(str(importlib.import_module(module).__file__)).read_text()
        assert text.count(old) == 1, old
        (tmp_path / f"wrong{number}.py").write_text(text.replace(old, new))
    run(f"""
import importlib
import torch
import quantized_checks as t
sys.path.insert(0, {str(tmp_path)!r})
case = (1, 2, 1, 100, 128, 32, 32, 32, True)
kinds = ((torch.float32, 8), (torch.bfloat16, 4))
for dtype, bits in kinds:
    t.check_attention(case, dtype, bits)
for number, (name, module) in enumerate({[(name, module) for name, (module, _, _) in MUTATIONS.items()]!r}):
    right = sys.modules[module]
    sys.modules[module] = importlib.import_module(f"wrong{{number}}")
    if module != {KERNEL!r}:
        importlib.reload(sys.modules[{KERNEL!r}])
    for dtype, bits in kinds:
        try:
            t.check_attention(case, dtype, bits)
        except AssertionError as error:
            assert "permitted" in str(error), error
        else:
            raise SystemExit(f"{{name}}, {{dtype}}, {{bits}} bits: not seen")
    sys.modules[module] = right
    importlib.reload(sys.modules[{KERNEL!r}])
""", **INTERPRETER)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
def test_triton_on_a_gpu() -> None:
    run("""
import quantized_checks as t
import test_quantized_attention as a
larger = [(1, 4, 2, 500, 500, 128, 64, 64, True), (2, 2, 2, 300, 333, 64, 128, 64, False)]
for case in a.CASES + larger:
    for dtype in t.DTYPES:
        for bits in a.BITS:
            t.check_quantiser(case, dtype, bits, "cuda")
            t.check_attention(case, dtype, bits, "cuda")
t.check_edges_of_the_quantiser("cuda")
""")
