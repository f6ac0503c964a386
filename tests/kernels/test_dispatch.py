"""What is imported when, which implementation runs, and what an order that cannot be met says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import olmfast.kernels as kernels


def run(*arguments, **environment):
    # PYTHONSAFEPATH: the folder kernels/ must not stand on the path as a package of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONSAFEPATH": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240)


def test_import_is_light_and_cpu_work_never_imports_triton():
    code = """
import sys
import olmfast.kernels as kernels
assert "torch" not in sys.modules and "triton" not in sys.modules
import torch
weight, factors = torch.ones(4, 4), None
u, s, vh = kernels.svd_factors(weight)
kernels.svd_noise(weight, u, vh, s[None])
kernels.row_scale(weight, torch.zeros(2, 4))
kernels.token_scores(weight, weight, torch.zeros(4, dtype=torch.long))
kernels.weighted_sum([weight, weight], [1, 2])
kernels.slerp(weight, weight, 0.5)
kernels.ties_merge([weight], [1.0], 0.5)
kernels.dare_mask((4, 4), 0.5, 1)
kernels.stacked_linear(weight, weight[None])
kernels.rms_norm(weight, weight[0], 1e-6)
kernels.gated(weight, weight, "silu")
kernels.rotate(weight[None, None], weight[None, None], weight[None], weight[None])
assert "triton" not in sys.modules
assert set(kernels.__all__) <= set(dir(kernels))
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


def test_everything_runs_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from olmfast.kernels import row_scale
row_scale(torch.ones(2, 2), torch.zeros(1, 2))
try:
    row_scale(torch.ones(2, 2), torch.zeros(1, 2), impl="triton")
except ValueError as error:
    assert "triton is not installed; use impl='auto'" in str(error), error
else:
    raise SystemExit("no error")
"""
    result = run("-c", code, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


def test_kernels_import_nothing_of_olmfast():
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for line in path.read_text().splitlines():
            if line.strip().startswith(("import olmfast", "from olmfast")):
                assert "olmfast.kernels" in line, f"{path.name}: {line}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU without interpreter says")
def test_an_order_for_triton_on_a_cpu_says_why_not(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = r"svd_noise: impl='triton' cannot run: the tensors are on cpu; use impl='auto'"
    with pytest.raises(ValueError, match=message):
        kernels.svd_noise(torch.ones(2, 2), torch.ones(2, 1), torch.ones(1, 2), torch.ones(1, 1), impl="triton")


def test_an_order_for_a_dtype_without_kernel_says_so(device):
    weight = torch.ones(2, 2, dtype=torch.float64, device=device)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="the kernel does not know dtype float64; use impl='auto'"):
        kernels.row_scale(weight, weight, impl="triton")
    with pytest.raises(ValueError, match="the tensors differ in dtype"):
        kernels.weighted_sum([weight.float(), weight.half()], [1, 1], impl="triton")


def test_devices_must_agree():
    with pytest.raises(ValueError, match="row_scale: the tensors are on different devices: cpu, meta"):
        kernels.row_scale(torch.ones(2, 2), torch.ones(1, 2, device="meta"))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'svd_nose'"):
        kernels.svd_nose  # noqa: B018


def test_self_check_passes_and_names_every_operation():
    result = run("-m", "olmfast.kernels")
    assert result.returncode == 0, result.stdout + result.stderr
    for name in kernels.__all__:
        if name.islower() and name != "runs_triton":  # which computes nothing
            assert name in result.stdout
