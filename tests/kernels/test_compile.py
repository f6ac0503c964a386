"""The kernels compile for real GPUs, without one: to machine code, within the shared memory of each card.

The interpreter takes much that Triton's compiler refuses, and knows nothing of shared memory.
"""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl
from olmfast.kernels import dare, noise, scaling, scores, spherical, summing, ties
from olmfast.kernels._dispatch import LazyKernel

for module in (dare, noise, scaling, scores, spherical, summing, ties):
    module.tl = tl
    for name, value in list(vars(module).items()):
        if isinstance(value, LazyKernel):
            setattr(module, name, triton.jit(value.function, do_not_specialize=value.plain))

# What a launch on real weights tells the compiler to be divisible by 16, besides all pointers.
ALIGNED = {"rows", "cols", "k", "width", "n_vocabulary", "n_values", "w_row", "u_row", "vh_k", "c_row", "out_j",
           "out_row", "h_head", "h_token", "w_head", "bias_head"}

def compiled(name, kernel, types, constants, capability, **options):
    signature = {}
    for argument in kernel.arg_names:
        signature[argument] = "constexpr" if argument in constants else types.get(argument, "i32")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument in ALIGNED
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(name, capability, binary.metadata.shared, flush=True)

def tile_of(tile):
    blocks = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k)
    return blocks, dict(num_stages=tile.n_stages, num_warps=tile.n_warps)

def svd_noise(capability, tile, precision):
    factor = "*bf16" if precision == "bf16" else "*fp32"
    types = dict(w_ptr="*bf16", u_ptr=factor, vh_ptr=factor, c_ptr="*fp32", out_ptr="*bf16", clamp="fp32")
    blocks, options = tile_of(tile)
    constants = dict(PRECISION=precision, WIDEN=False, GROUP=8, w_col=1, u_k=1, vh_col=1, c_k=1, out_col=1, **blocks)
    compiled("svd_noise", noise._svd_noise_kernel, types, constants, capability, **options)

def token_scores(capability, tile, dtype):
    types = dict(h_ptr=dtype, w_ptr=dtype, bias_ptr=dtype, label_ptr="*i64", max_ptr="*fp32", arg_ptr="*i64",
                 sum_ptr="*fp32", own_ptr="*fp32", scale="fp32", softcap="fp32")
    blocks, options = tile_of(tile)
    constants = dict(HAS_BIAS=True, HAS_SCALE=True, HAS_CAP=True, PRECISION="ieee", WIDEN=False, h_at=1, w_at=1,
                     **blocks)
    compiled("token_scores", scores._scores_kernel, types, constants, capability, **options)

def others(capability):
    fields = dict(max_ptr="*fp32", arg_ptr="*i64", sum_ptr="*fp32", own_ptr="*fp32")
    outs = dict(max_out="*fp32", arg_out="*i64", lse_out="*fp32", own_out="*fp32")
    compiled("combine", scores._combine_kernel, {**fields, **outs}, dict(BLOCK=128), capability)
    for axis in (0, 1):
        compiled("row_scale", scaling._row_scale_kernel, dict(w_ptr="*bf16", s_ptr="*fp32", out_ptr="*bf16"),
                 dict(AXIS=axis, BLOCK_ROWS=8, BLOCK_COLS=512, w_col=1, s_at=1, out_col=1), capability)
    compiled("weighted_sum", summing._weighted_sum_kernel,
             dict(table_ptr="*i64", weight_ptr="*fp32", out_ptr="*bf16", divisor="fp32"), dict(BLOCK=2048), capability)
    compiled("slerp", spherical._products_kernel, dict(a_ptr="*fp16", b_ptr="*fp16", part_ptr="*fp32"),
             dict(BLOCK=2048, BLOCKS_PER_PROGRAM=8), capability)
    compiled("dare_mask", dare._dare_mask_kernel, dict(out_ptr="*i8"), dict(BLOCK=1024), capability)
    tables = dict(table_ptr="*i64", base_ptr="*bf16", prefix_ptr="*i64", threshold_ptr="*i64", trim_ptr="*i64",
                  before_ptr="*i64", w_ptr="*fp32", out_ptr="*bf16", hist_ptr="*i64", equal_ptr="*i64", scale="fp32")
    compiled("ties digits", ties._ties_digits_kernel, tables, dict(HAS_BASE=True, SHIFT=20, WIDTH=11,
             N_BINS=ties.N_BINS, BLOCK=ties.BLOCK, BLOCKS_PER_PROGRAM=ties.BLOCKS_PER_PROGRAM), capability)
    compiled("ties equal", ties._ties_equal_kernel, tables, dict(HAS_BASE=False, BLOCK=ties.BLOCK), capability)
    compiled("ties merge", ties._ties_merge_kernel, tables, dict(HAS_BASE=True, NORMALIZE=True, TINY=1e-8,
             BLOCK=ties.BLOCK), capability, enable_fp_fusion=False)

capability, limit = int(sys.argv[1]), int(sys.argv[2])
fit = lambda tiles, size: next((tile for tile in tiles if tile.n_bytes(size) <= limit), tiles[-1])
for precision, size in (("tf32", 4), ("bf16", 2)):
    svd_noise(capability, fit(noise.TILES, size), precision)
svd_noise(capability, fit(noise.TILES[1:], 4), "ieee")
token_scores(capability, fit(scores.TILES, 2), "*bf16")
if "all" in sys.argv:
    token_scores(capability, fit(scores.FLOAT32_TILES, 4), "*fp32")
    others(capability)
"""

# Compute capability, bytes of shared memory a block may use there, whether every kernel is tried.
CARDS = {"Ada and consumer Ampere": (89, 101_376, "all"), "Hopper": (90, 232_448, ""), "64 KB": (80, 65_536, "")}


@pytest.mark.parametrize("card", CARDS)
def test_compiles_within_shared_memory(card, tmp_path):
    pytest.importorskip("triton")
    capability, limit, extent = CARDS[card]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONSAFEPATH": "1",
    }
    script = tmp_path / "compile_kernels.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, str(script), str(capability), str(limit), extent],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    sizes = {line.rsplit(" ", 1)[0]: int(line.rsplit(" ", 1)[1]) for line in result.stdout.splitlines()}
    assert sizes
    assert max(sizes.values()) <= limit, sizes
