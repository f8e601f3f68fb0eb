"""Every kernel compiles for real GPUs on a machine that has none, with the configurations that ship.

For each: no register is spilled, shared memory stays within what a block may have, and the instructions that make it
fast are there. Tables of registers, shared memory and spills stand below pytest's summary. Every row of every
table is compiled for every target, every kind of layer with the rows that it is given first; head dims 64, 96, 104
and 128, where rows that differ in nothing but their splits count as one.
"""

import re
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastigpt.kernels import launch
from fastigpt.kernels.causal_attention import _causal_attention
from fastigpt.kernels.choose_rows import choose_rows, filter_warps
from fastigpt.kernels.decode_attention import _decode_attention, heads_of_a_program, warps_of, widest
from fastigpt.kernels.kv_cache import _append_kv
from fastigpt.kernels.norm_linear import _finish, _norm, _norm_linear
from fastigpt.kernels.norm_rows import _norm_rows
from fastigpt.kernels.prefix_attention import _prefix_attention
from fastigpt.kernels.sample_head import _sample_head

if launch.interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory a block may have, in bytes, by the vendors' tables. What ships for sm_80 is what any NVIDIA GPU gets
# that has no table of its own, so it must fit the 99 KiB of sm_86 and sm_89.
TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), 101376),
    "sm90": (GPUTarget("cuda", 90, 32), 232448),
    "sm100": (GPUTarget("cuda", 100, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}
# Integers that the launchers pass as multiples of 16: Triton specialises on it, as it does at run time.
MULTIPLES = {"q_stride", "row_stride", "batch_q", "batch_k", "batch_v", "stride_q", "stride_k", "stride_v", "capacity"}
# head_dim: n_head of Image GPT's small and large, of LlamaGen's 3B, whose heads of 100 the engine pads, and of medium.
HEADS = {64: 8, 96: 16, 104: 32, 128: 8}
SHARED = {64: (14, 2), 128: (32, 2)}  # head_dim: heads of queries and of keys, of SimpleAR 0.5B and GLM-Image
WIDTH = 512


def argument_types(function, constants, half, cache):
    """Pointers and integers by name, as the engine calls the kernels in bfloat16."""
    state = {"pass_starts": "*i8", "index": "*i64", "seed_low": "*i64", "seed_high": "*i64", "top_k": "*i64",
             "top_p": "*fp64", "log_likelihood": "*fp64"}  # fmt: skip
    int32 = {"canvas", "position", "end", "inputs", "slots", "offset", "chosen", "arrivals", "blocks", "lengths",
             "order", "source", "lanes", "guided", "scored", "failed", "part_token", "broken", "starts"}  # fmt: skip
    float32 = {
        "part_m",
        "part_l",
        "part_acc",
        "prefix_m",
        "prefix_l",
        "prefix_acc",
        "scores",
        "noise",
        "k_scale",
        "v_scale",
        "gain",
        "temperature",
        "part_score",
        "part_max",
        "part_sum",
        "known_logit",
        "nats",
        "turns",
        "weight_scale",
        "row_scale",
        "factor",
    }
    types = {}
    for name in function.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in state:
            types[name] = state[name]
        elif name in int32:
            types[name] = "*i32"
        elif name == "x" and function is _norm_linear and not constants["NORM"]:
            types[name] = half
        elif name in {*float32, "x"} or (name == "out" and constants.get("RESIDUAL")):
            types[name] = "*fp32"
        elif name in {"k_cache", "v_cache"} or (name in {"k", "v"} and function is not _append_kv):
            types[name] = cache
        elif name == "weight" and constants.get("SCALED"):
            types[name] = "*i8"
        elif name == "hidden":
            types[name] = "*fp32" if constants["NORM"] else half
        elif name in {"q", "k", "v", "out", "weight", "bias", "wte", "wpe", "y"}:
            types[name] = half
        elif name == "scale" and "GUIDED" in constants:
            types[name] = "*fp32"  # of guidance, one for each canvas
        elif name in {"scale", "epsilon"}:
            types[name] = "fp32"
        else:
            types[name] = "i32"
    return types


def compiled(function, constants, target, warps, half="*bf16", cache="*bf16", **options):
    if "OVERLAP" in function.arg_names:
        constants = {"OVERLAP": False, **constants}
    types = argument_types(function, constants, half, cache)
    aligned = [i for i, name in enumerate(function.arg_names) if types[name][0] == "*" or name in MULTIPLES]
    source = ASTSource(function, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(source, target=target, options={"num_warps": warps, **options})


def without_equals(rows):
    """The first and the last of rows that differ in nothing but their splits, of which one joins no parts."""
    kinds = {}
    for row in rows:
        alike = tuple((key, value) for key, value in row.items() if key not in ("splits", *launch.BOUNDS))
        kinds.setdefault(alike, []).append(row)
    return [row for alike in kinds.values() for row in (alike[:1] if len(alike) == 1 else (alike[0], alike[-1]))]


def cases(configs, half, amd=False):
    """(name, kernel, constants, warps, cache dtype) for every row of a table, with each head dim, computing in `half`:
    "*bf16", or "*fp32"."""
    wide, dtype = half == "*fp32", torch.float32 if half == "*fp32" else torch.bfloat16

    def rows(kernel):
        return configs[f"{kernel}_float32" if wide and f"{kernel}_float32" in configs else kernel]

    def setting(kernel, size):
        return launch.settings(configs, kernel, size, dtype)

    for head_dim, heads in HEADS.items():
        padded = triton.next_power_of_2(head_dim)
        shape = {"HEADS": heads, "GROUP": 1, "HEAD_DIM": head_dim, "BLOCK_D": padded}
        c = setting("causal_attention", head_dim)
        constants = {**shape, "BLOCK_M": c["block_m"], "BLOCK_N": c["block_n"], "STAGES": c["stages"]}
        yield f"causal_attention {head_dim}", _causal_attention, constants, c["warps"], half
        for c in rows("prefix_attention"):
            constants = {**shape, "BLOCK_M": c["block_m"], "BLOCK_S": c["block_s"], "SPLITS": c["splits"],
                         "SCALED": False, "STAGES": c["stages"]}  # fmt: skip
            name = f"prefix_attention {head_dim} m={c['block_m']} splits={c['splits']}"
            yield name, _prefix_attention, constants, c["warps"], half
        decode = rows("decode_attention")
        windows = [(1, c, half) for c in (decode if head_dim == 64 else without_equals(decode))]
        windows += [(8, c, half) for c in rows("decode_attention")[:1]]
        windows += [(64, c, half) for c in rows("decode_attention")[-1:]]
        windows += [(16, decode[-1], "*i8")] if head_dim == 128 else []
        if head_dim == 64:
            windows += [(1, c, t) for c in rows("decode_attention")[-1:] for t in ("*i8", "*fp8e4nv")]
        windows = [(window, c, cache, shape) for window, c, cache in windows]
        if head_dim in SHARED:
            heads, kv_heads = SHARED[head_dim]
            fewer = {**shape, "HEADS": heads, "GROUP": heads // kv_heads}
            windows += [(1, decode[0], half, fewer), (4, decode[-1], half, fewer), (4, decode[-1], "*i8", fewer)]
        for window, c, cache, heads in windows:
            share = heads_of_a_program(heads["GROUP"], window, dtype)
            block_w = min(widest(dtype), max(16, triton.next_power_of_2(window * share)))
            constants = {**heads, "SHARE": share, "WINDOW": window, "BLOCK_W": block_w, "BLOCK_S": c["block_s"],
                         "SPLITS": c["splits"], "PREFIX": c["block_s"] if window == 8 else 0, "SCALED": cache != half,
                         "STAGES": c["stages"]}  # fmt: skip
            name = f"decode_attention {head_dim} W={window} splits={c['splits']} {cache[1:]}"
            name += f" group={heads['GROUP']}" if share > 1 else ""
            yield name, _decode_attention, constants, warps_of(c, head_dim, cache != half, amd), cache
    heads, width = HEADS[64], WIDTH
    nothing = {"NORM": False, "APART": False, "SCALED": False, "BIAS": False, "ACTIVATION": None, "RESIDUAL": False,
               "KV": 0}  # fmt: skip
    layers = {
        "qkv": (width, 3 * width, {"NORM": True, "KV": width}),
        "fc": (width, 4 * width, {"NORM": True, "ACTIVATION": "quick_gelu", "BIAS": True}),
        "proj": (width, width, {"RESIDUAL": True}),
        "out": (4 * width, width, {"RESIDUAL": True}),
        "large out": (6144, 1536, {"RESIDUAL": True}),
        "turned": (2048, 3072, {"NORM": True, "KV": 512, "TURNED": 2560}),
        "turned 104": (3200, 9984, {"NORM": True, "KV": 3328, "TURNED": 6656, "BIAS": True, "HEAD_DIM": 104}),
        "gated": (2048, 11264, {"NORM": True, "ACTIVATION": "gated_silu"}),
        "gelu": (2048, 2048, {"NORM": True, "ACTIVATION": "gelu", "BIAS": True}),
        "int8": (2048, 11264, {"NORM": True, "ACTIVATION": "gated_silu", "SCALED": True}),
        "int8 out": (5632, 2048, {"RESIDUAL": True, "SCALED": True}),
    }
    seen = []
    for name, (k, n, steps) in layers.items():
        for count in (1, 32, 64, 512):
            c = launch.settings(configs, "norm_linear", count, dtype, k=k, n=n)
            if count > 1 and c in seen and not (count == 512 and steps.get("SCALED")):
                continue
            seen.append(c)
            block = {"BLOCK_M": c["block_m"], "BLOCK_N": c["block_n"], "BLOCK_K": c["block_k"], "STAGES": c["stages"],
                     "EARLY": c["early"]}  # fmt: skip
            constants = {**nothing, "TURNED": 0, "HEAD_DIM": 64, **steps, "K": k, "N": n, **block}
            if constants["NORM"] and c["apart"]:
                constants |= {"NORM": False, "APART": True}
            yield f"norm_linear {name} rows={count}", _norm_linear, constants, c["warps"], half
    linear_head = {"WIDTH": width, "INNER": width, "NORM": True, "BIAS": False}
    deep_head = {"WIDTH": 2048, "INNER": 2048, "NORM": False, "BIAS": True, "wpe": None}
    windows = ((1, False), (1, True), (16, True), (32, False))
    linear = [(tokens, linear_head, *window) for tokens in (512, 16384) for window in windows]
    for tokens, head, window, filters in [*linear, *((16384, deep_head, *window) for window in windows[1:])]:
        c = launch.settings(configs, "sample_head", window, dtype, k=head["INNER"], n=tokens)
        ends = {"TOKENS": tokens, "V": tokens, "W": window, "BLOCK_W": window, "CANVASES": max(1, 16 // window),
                "BLOCK_R": max(16, window), "BLOCK_T": min(32, tokens // c["block_c"]), "BLOCK_E": 256,
                "GUIDED": filters, "TOP_K": filters, "TOP_P": filters, "SCORE": True, "ADVANCE": True}  # fmt: skip
        constants = {**ends, **head, "BLOCK_C": c["block_c"], "BLOCK_K": c["block_k"], "STAGES": c["stages"],
                     "EARLY": c["early"]}  # fmt: skip
        name = f"{tokens} W={window}{' filters' if filters else ''}{'' if head['NORM'] else ' deep'}"
        yield f"sample_head {name}", _sample_head, constants, c["warps"], half
        if filters:
            block_v = min(tokens, c["block_v"])
            constants = {**ends, "TILES": tokens // c["block_c"], "BLOCK_V": block_v, "CHUNK": c["chunk"]}
            constants |= {name: head[name] for name in ("WIDTH", "wpe") if name in head}
            yield f"choose_rows {name}", choose_rows, constants, filter_warps(block_v), half
    append = {
        "HEADS": heads,
        "HEAD_DIM": 64,
        "BLOCK_H": 8,
        "BLOCK_D": 64,
        "LIMIT": 448.0,
        "ROUND": False,
        "PLACED": False,
    }
    yield "append_kv fp8", _append_kv, append, 4, "*fp8e4nv"
    for k in () if wide else (width, 3200):  # no table has rows for float32 whose norm is apart
        yield f"norm_rows {k}", _norm_rows, {"K": k, "BLOCK_M": 16, "BLOCK_K": 32}, 8, half
    yield "rms_norm", _norm, {"K": width, "BLOCK_K": width, "NORM": True}, 4, half
    for name, steps in (
        ("quick_gelu", {"ACTIVATION": "quick_gelu"}),
        ("gated", {"N": 11264, "ACTIVATION": "gated_silu"}),
        ("turned", {"N": 9600, "TURNED": 6400, "HEAD_DIM": 100}),
    ):
        finish = {"N": 2048, "HEAD_DIM": 2, "SCALED": True, "BIAS": True, "ACTIVATION": None, "RESIDUAL": False,
                  "TURNED": 0, **steps}  # fmt: skip
        yield f"finish {name}", _finish, {**finish, "BLOCK_N": 1024}, 4, half


def resources(kernel, target, folder, name):
    """registers, spills and the instructions of a compiled kernel."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        numbers = {m[1]: int(m[2]) for m in re.finditer(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
        return numbers["vgpr_count"], numbers["vgpr_spill_count"], text
    path = folder / (re.sub(r"\W", "_", name) + ".cubin")
    path.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True, check=True
    )
    code = subprocess.run([TOOLS / "nvdisasm", path], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"REG:(\d+)", usage.stdout)[-1]), len(re.findall(r"\b(?:STL|LDL)\b", code)), code


def expected_instructions(name, target, half):
    """What makes this kernel fast on this GPU, as a pattern of its machine code."""
    if target.backend == "hip":
        return None
    if name.startswith("causal_attention"):
        if half == "*fp32":
            return r"\bFFMA"
        return {80: r"\bHMMA", 90: r"\bHGMMA", 100: r"UTCHMMA"}[target.arch]
    if name.startswith(("decode_attention", "norm_linear")):
        return r"\b(LDG\.E\.128|LDGSTS\.E\.BYPASS\.128|LDG\.E\.LTC\S*\.128)"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("half", ["*bf16", "*fp32"])
@pytest.mark.parametrize("family", TARGETS)
def test_every_configuration_compiles_without_spills(family, half, tmp_path, show):
    target, shared_limit = TARGETS[family]
    todo = [
        case
        for case in cases(launch.table(family), half, target.backend == "hip")
        if not (case[4] == "*fp8e4nv" and family in ("sm80", "gfx942"))  # refused there: see launch.stores_float8
    ]

    def work(case):
        name, function, constants, warps, cache = case
        kernel = compiled(function, constants, target, warps, half, cache)
        return name, kernel.metadata.shared, *resources(kernel, target, tmp_path, name)

    # One after the other: in CPython 3.11 two threads that parse Python at once can end in a SystemError.
    rows = [work(case) for case in todo]
    lines = [f"{name:40} {registers:9} {shared:7} {spills:7}" for name, shared, registers, spills, _ in rows]
    show("\n".join([f"{'compiled for ' + family + ', ' + half[1:]:40} registers  shared  spills", *lines]))
    for name, shared, _, spills, code in rows:
        assert spills == 0, f"{name} spills"
        assert shared <= shared_limit, f"{name} needs {shared} bytes of shared memory"
        pattern = expected_instructions(name, target, half)
        assert pattern is None or re.search(pattern, code), f"{name} lacks {pattern}"


def test_every_configuration_file_is_complete():
    files = sorted(path.stem for path in launch.FOLDER.glob("*.json"))
    assert {"default", "fixed", "interpreter", "sm90"} <= set(files)
    wanted = {name: set(rows[0]) - set(launch.BOUNDS) for name, rows in launch.table("default").items()}
    for file in files:
        configs = launch.table(file)
        # float32 linear layers need rows of their own where those for 16 bits spill; the interpreter spills nothing.
        optional = {name for name in wanted if name.endswith("_float32")}
        optional = optional if file == "interpreter" else {"norm_linear_float32"}
        assert set(configs) | optional == set(wanted), file
        for kernel, rows in configs.items():
            sizes = [row.get("upto", float("inf")) for row in rows]
            assert sizes == sorted(sizes) and not set(rows[-1]) & set(launch.BOUNDS), f"{file}: {kernel}"
            assert all(set(row) & set(launch.BOUNDS) for row in rows[:-1]), f"{file}: {kernel}"
            assert all(set(row) - set(launch.BOUNDS) == wanted[kernel] for row in rows), f"{file}: {kernel}"


def test_stores_float8_is_what_the_compiler_accepts():
    append = {"HEADS": 8, "HEAD_DIM": 64, "BLOCK_H": 8, "BLOCK_D": 64, "LIMIT": 448.0, "ROUND": False, "PLACED": False}
    with pytest.raises(Exception, match=r"fp8e4nv|CompilationError"):
        compiled(_append_kv, append, TARGETS["sm80"][0], 4, cache="*fp8e4nv")
    assert torch.float8_e4m3fn in launch.SCALED_TYPES
