"""The kernels compile for real GPUs, without one: what their machine code is like, and that each card can hold it.

The operations themselves run, on CPU tensors, with a driver that compiles whatever is launched and launches nothing: so
tiles, alignments and constants are those of a launch on a card. The interpreter takes much that Triton's compiler
refuses, and knows nothing of shared memory, registers or the width of a load.
"""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, pathlib, re, subprocess, sys, tempfile
import torch, triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from olmfast.kernels import _dispatch, dare_mask, row_scale, slerp, svd_noise, ties_merge, token_scores, weighted_sum
from olmfast.kernels import gated, rms_norm, rotate
from olmfast.kernels import noise, scores

capability, limit, extent = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

class Utilities:
    def get_device_properties(self, device):
        return {"max_shared_mem": limit, "multiprocessor_count": 132}
    def load_binary(self, name, binary, shared, device):
        return 1, 1, 0, 0, 1024

class Driver:
    utils = Utilities()
    def launcher_cls(self, source, metadata):
        return lambda *arguments: None
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget("cuda", capability, 32)

triton.runtime.driver.set_active(Driver())
_dispatch._obstacle = lambda *arguments: None
_dispatch._shared_memory = lambda device: limit
if hasattr(_dispatch, "takes_descriptors"):
    noise.takes_descriptors = scores.takes_descriptors = lambda *arguments: capability == 90

def count(pattern, text):
    return len(re.findall(pattern, text))

def width(access):
    size, vector = re.search(r"[.][bfus](\\d+)$", access), re.search(r"[.]v(\\d)", access)
    return int(size.group(1)) // 8 * (int(vector.group(1)) if vector else 1)

tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
case = ""

def loaded(module, function, name, files, digest):
    files = {path.rsplit(".", 1)[1]: pathlib.Path(path) for path in files.values() if "." in pathlib.Path(path).name}
    ptx, ttgir = files["ptx"].read_text(), files["ttgir"].read_text()
    machine = subprocess.run([tool, "-sass", files["cubin"]], capture_output=True, text=True, check=True).stdout
    accesses = re.findall(r"\\b((?:ld|st)[.]global\\S*)", ptx)
    # Single numbers, and a row or column of factors, are no streams.
    few = r"tensor<(?:1x)?(?:\\d\\d?|1[012]\\d)(?:x1)?x!tt[.]ptr"
    single = count(r"tt[.](?:load|store) [^\\n]*: (?:!tt[.]ptr|" + few + ")", ttgir)
    row = dict(
        case=case, name=name, shared=json.loads(files["json"].read_text())["shared"], single=single,
        narrow=sum(width(access) < 16 for access in accesses), wide=sum(width(access) >= 16 for access in accesses),
        copies=[int(size, 16) for size in re.findall(r"cp[.]async[.]c[ag][.]shared[^;]*?, (0x\\w+)", ptx)],
        bulk=count(r"cp[.]async[.]bulk[.]tensor", ptx), wgmma=count(r"wgmma[.]mma_async", ptx),
        mma=count(r"mma[.]sync", ptx), joined=count(r"fma[.]rn[.](?:ftz[.])?f", ptx),
        spilled=count(r"\\b(?:STL|LDL)", machine),
    )
    print(json.dumps(row), flush=True)

knobs.runtime.kernel_load_end_hook = loaded
rows, cols, k = 256, 512, 256
bf16, fp32 = torch.bfloat16, torch.float32
zeros = torch.zeros

def run(title, call):
    global case
    case = title
    call()

inputs = zeros(rows, cols, dtype=bf16), zeros(rows, k), zeros(k, cols), zeros(3, k)
for precision in ("tf32", "bf16", "ieee"):
    run(f"svd_noise {precision}", lambda: svd_noise(*inputs, precision=precision, impl="triton"))
labels = zeros(64, dtype=torch.int64)
def score(dtype, **options):
    hidden, head = zeros(64, 256, dtype=dtype), zeros(1024, 256, dtype=dtype)
    return lambda: token_scores(hidden, head, labels, check=False, impl="triton", **options)
run("token_scores bf16", score(bf16))
bias = zeros(1024, dtype=bf16)
run("token_scores bf16 with all", score(bf16, bias=bias, scale=2.0, softcap=3.0))
run("token_scores fp32", score(fp32))
if extent == "all":
    if hasattr(scores, "IEEE_TILES"):
        run("token_scores ieee", score(fp32, precision="ieee"))
    for dtype in (bf16, fp32):
        inputs = [zeros(rows, cols, dtype=dtype) for _ in range(3)]
        run(f"weighted_sum {dtype}", lambda: weighted_sum(inputs, [1, 2, 3], impl="triton"))
        run(f"slerp {dtype}", lambda: slerp(*inputs[:2], 0.5, impl="triton"))
        base = zeros(rows, cols, dtype=dtype)
        run(f"ties_merge {dtype}", lambda: ties_merge(inputs, [1, 2, 3], 0.5, base=base, impl="triton"))
        for axis in (0, 1):
            scale = zeros(2, (rows, cols)[axis])
            run(f"row_scale {dtype} {axis}", lambda: row_scale(inputs[0], scale, axis=axis, impl="triton"))
    run("dare_mask", lambda: dare_mask((rows, cols), 0.5, 1, impl="triton"))
# A pass calls these for every block, on every card.
for dtype in (bf16, fp32):
    for n in (128, 896, 4096, 16384):
        x, weight = zeros(4, n, dtype=dtype), zeros(n, dtype=dtype)
        run(f"rms_norm {dtype} {n}", lambda: rms_norm(x, weight, 1e-6, impl="triton"))
        options = {"offset": 1.0, "rounded_first": False, "impl": "triton"}
        run(f"rms_norm {dtype} {n} offset", lambda: rms_norm(x, weight, 1e-6, **options))
    for activation in ("silu", "gelu_tanh", "gelu"):
        whole = zeros(4, 2 * 11008, dtype=dtype)
        for parts in (whole.chunk(2, dim=-1), (whole, whole)):
            run(f"gated {dtype} {activation}", lambda: gated(*parts, activation, impl="triton"))
    for size in (64, 80, 96, 128, 256):
        q, k = (zeros(2, 16, heads, size, dtype=dtype).transpose(1, 2) for heads in (14, 2))
        angles = zeros(1, 16, size, dtype=dtype)
        run(f"rotate {dtype} {size}", lambda: rotate(q, k, angles, angles, impl="triton"))
        run(f"rotate {dtype} {size} fp32", lambda: rotate(q, k[:, :1], angles.float(), angles.float(), impl="triton"))
"""

# Compute capability, bytes of shared memory a block may use there, whether every kernel is tried.
CARDS = {
    "Ada and consumer Ampere": (89, 101_376, "all"),
    "A100": (80, 166_912, ""),
    "Hopper": (90, 232_448, "all"),
    "64 KB": (80, 65_536, ""),
}
STREAMS = (
    "_weighted_sum_kernel", "_products_kernel", "_arc_kernel", "_dare_mask_kernel", "_row_scale_kernel",
    "_ties_count_kernel", "_ties_equal_kernel", "_ties_merge_kernel", "_scaled_kernel",
    "_rms_norm_kernel", "_gated_kernel", "_rotate_kernel",
)  # fmt: skip
PRODUCTS = ("_svd_noise_kernel", "_svd_noise_hopper_kernel", "_scores_kernel")
# Sines in float64 have a table in local memory, which their arguments here never reach; one program runs it.
MAY_SPILL = ("_coefficients_kernel",)


@pytest.fixture(scope="module", params=CARDS)
def compiled(request, tmp_path_factory):
    """What was compiled for a card: its capability, its shared memory, and a row for each kernel."""
    pytest.importorskip("triton")
    capability, limit, extent = CARDS[request.param]
    folder = tmp_path_factory.mktemp("compile")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONSAFEPATH": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    script = folder / "compile_kernels.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, str(script), str(capability), str(limit), extent],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return capability, limit, [json.loads(line) for line in result.stdout.splitlines()]


def refused(rows, reason):
    return [f"{row['case']}: {row['name']}: {reason(row)}" for row in rows if reason(row)]


def test_fits_the_shared_memory(compiled):
    _, limit, rows = compiled
    assert {row["name"] for row in rows} & {*PRODUCTS}
    assert not refused(rows, lambda row: row["shared"] > limit and f"{row['shared']} bytes")


def test_streams_are_read_and_written_sixteen_bytes_at_a_time(compiled):
    streams = [row for row in compiled[2] if row["name"] in STREAMS]
    assert streams
    # Loops over a few numbers may be unrolled by four.
    assert not refused(streams, lambda row: row["narrow"] > 4 * row["single"] and f"{row['narrow']} narrow ones")
    assert not refused(streams, lambda row: not row["wide"] and "no wide ones")


def test_tiles_are_copied_sixteen_bytes_at_a_time(compiled):
    products = [row for row in compiled[2] if row["name"] in PRODUCTS]
    assert not refused(products, lambda row: any(size != 16 for size in row["copies"]) and f"copies of {row['copies']}")
    assert not refused(products, lambda row: not row["copies"] and not row["bulk"] and "not pipelined")


def test_products_run_on_tensor_cores(compiled):
    capability, _, rows = compiled
    products = [row for row in rows if row["name"] in PRODUCTS and "ieee" not in row["case"]]
    unit = "wgmma" if capability == 90 else "mma"
    assert products
    if capability == 90:
        assert any(row["name"] == "_svd_noise_hopper_kernel" for row in products)
    assert not refused(products, lambda row: not row[unit] and f"no {unit}")


def test_what_torch_rounds_twice_is_rounded_twice(compiled):
    rows = [row for row in compiled[2] if row["name"] in ("_rms_norm_kernel", "_rotate_kernel")]
    assert {row["name"] for row in rows} == {"_rms_norm_kernel", "_rotate_kernel"}
    assert not refused(rows, lambda row: row["joined"] and f"{row['joined']} products joined with a sum")


def test_nothing_spills(compiled):
    rows = [row for row in compiled[2] if row["name"] not in MAY_SPILL]
    assert not refused(rows, lambda row: row["spilled"] and f"{row['spilled']} accesses to local memory")
