"""A row's numbers are the same in every window, batch and launch configuration: in bfloat16 all the sums that tokens
depend on run through one matrix instruction in one order. Read from what the compiler makes of what ships.
"""

import re
import subprocess

import pytest

pytest.importorskip("triton")

from test_compile import TARGETS, TOOLS, WIDTH, compiled

from fastigpt.kernels import launch
from fastigpt.kernels.decode_attention import WIDEST, _decode_attention
from fastigpt.kernels.norm_linear import _norm_linear
from fastigpt.kernels.norm_rows import _norm_rows
from fastigpt.kernels.prefix_attention import _prefix_attention
from fastigpt.kernels.sample_head import _sample_head

if launch.interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

FAMILIES = {"sm80": "default", "sm90": "sm90", "sm100": "default"}  # a target, and the table it gets


def arithmetic(made, tmp_path):
    """What a result can depend on in a compiled kernel: the matrix instructions of the machine's code, the layouts of
    their operands (how sums of sixteen are grouped), and the floating-point operations there are."""
    graph, ptx = made.asm["ttgir"], made.asm["ptx"]
    layouts = re.findall(r"nvidia_mma<\{versionMajor = (\d), versionMinor = \d, .*?instrShape = \[([\d, ]+)\]", graph)
    grouped = re.findall(r"#ttg\.dot_op<\{opIdx = (\d), parent = #\w+, kWidth = (\d)\}>", graph)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(made.asm["cubin"])
    code = subprocess.run([TOOLS / "nvdisasm", path], capture_output=True, text=True, check=True).stdout
    kinds = re.findall(r"\b((?:fma|mul|add|sub|div|rcp|rsqrt|sqrt|ex2|max|min|cvt)\.[\w.]*f(?:32|16)(?:x2)?)\b", ptx)
    # Two at once are each what one is, and these are rounded to nearest where nothing is said.
    kinds = [re.sub(r"(?<=f32)x2$", "", re.sub(r"^(fma|mul|add|sub)\.rn\.", r"\1.", kind)) for kind in kinds]
    return {
        "instructions": set(re.findall(r"\b(?:[HIQ]MMA|HGMMA|UTC\w*MMA)\S*", code)),
        "layouts": {(version, tuple(shape.split(", "))[-2:]) for version, shape in layouts},
        "grouped": set(grouped),
        "operations": set(kinds),
        # A reduction's order would depend on how a block is spread over threads.
        "summed across threads": sum(
            "arith.addf" in body for body in re.findall(r"\"tt\.reduce\".*?\}\)", graph, re.S)
        ),
    }


def same(found):
    """All of them are one arithmetic, of the narrow matrix instruction."""
    for each in found:
        assert each["instructions"] == {"HMMA.16816.F32.BF16"}
        assert each["layouts"] == {("2", ("16", "8"))} and each["grouped"] == {("0", "2"), ("1", "2")}
        assert each["summed across threads"] == 0
        assert each["operations"] == found[0]["operations"]


def unlike(configs, kernel, sizes, **shape):
    """The configurations that a table has for these sizes, each once."""
    found = [launch.settings(configs, kernel, size, **shape) for size in sizes]
    return [each for i, each in enumerate(found) if each not in found[:i]]


@pytest.mark.slow
@pytest.mark.parametrize("target", FAMILIES)
def test_products_are_one_arithmetic_for_every_number_of_rows(target, tmp_path):
    k, n = WIDTH, 4 * WIDTH
    constants = {"SCALED": False, "BIAS": True, "ACTIVATION": "quick_gelu", "RESIDUAL": False, "KV": 0, "TURNED": 0,
                 "HEAD_DIM": 2, "K": k, "N": n}  # fmt: skip
    norm = compiled(_norm_rows, {"K": k, "BLOCK_M": 16, "BLOCK_K": 32}, TARGETS[target][0], 8)
    todo = unlike(launch.table(FAMILIES[target]), "norm_linear", (1, 32, 64, 512), k=k, n=n)
    todo += unlike(launch.table("fixed"), "norm_linear", (1,), k=k, n=n)
    found = []
    for c in todo:
        sizes = {"BLOCK_M": c["block_m"], "BLOCK_N": c["block_n"], "BLOCK_K": c["block_k"], "STAGES": c["stages"],
                 "EARLY": c["early"], "NORM": not c["apart"], "APART": c["apart"]}  # fmt: skip
        made = compiled(_norm_linear, {**constants, **sizes}, TARGETS[target][0], c["warps"])
        found.append(arithmetic(made, tmp_path))
        if c["apart"]:  # both launches together are what one is elsewhere
            other = arithmetic(norm, tmp_path)
            found[-1] = {name: each + other[name] if isinstance(each, int) else each | other[name]
                         for name, each in found[-1].items()}  # fmt: skip
    same(found)
    assert len(todo) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("target", FAMILIES)
def test_attention_is_one_arithmetic_for_every_window_and_number_of_programs(target, tmp_path):
    """Of the widest window as well, which is then cut into blocks of 32 queries."""
    configs, shape = launch.table(FAMILIES[target]), {"HEADS": 8, "GROUP": 1, "SHARE": 1, "HEAD_DIM": 64}
    shape |= {"BLOCK_D": 64, "SCALED": False}
    found = []
    for window, images in ((1, 1), (1, 64), (64, 64)):
        c = launch.settings(configs, "decode_attention", 8 * images)
        block_w = min(WIDEST, max(16, window))
        constants = {**shape, "WINDOW": window, "BLOCK_W": block_w, "BLOCK_S": c["block_s"], "SPLITS": c["splits"],
                     "PREFIX": 0, "STAGES": c["stages"]}  # fmt: skip
        found.append(arithmetic(compiled(_decode_attention, constants, TARGETS[target][0], c["warps"]), tmp_path))
    same(found)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 512])
def test_shared_prefixes_are_attended_to_in_that_arithmetic(rows, tmp_path):
    c = launch.settings(launch.table("sm90"), "prefix_attention", rows)
    constants = {"HEADS": 8, "GROUP": 1, "HEAD_DIM": 64, "BLOCK_D": 64, "BLOCK_M": c["block_m"],
                 "BLOCK_S": c["block_s"], "SPLITS": c["splits"], "SCALED": False, "STAGES": c["stages"]}  # fmt: skip
    same([arithmetic(compiled(_prefix_attention, constants, TARGETS["sm90"][0], c["warps"]), tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("target", FAMILIES)
def test_the_head_is_one_arithmetic_for_every_window(target, tmp_path):
    configs, found = launch.table(FAMILIES[target]), []
    for window in (1, 32):
        c = launch.settings(configs, "sample_head", window, k=WIDTH, n=512)
        constants = {"WIDTH": WIDTH, "INNER": WIDTH, "NORM": True, "BIAS": False, "TOKENS": 512, "V": 512,
                     "W": window, "BLOCK_W": window, "CANVASES": max(1, 16 // window), "BLOCK_R": max(16, window),
                     "BLOCK_T": 16, "BLOCK_E": 256, "GUIDED": False, "TOP_K": False, "TOP_P": False, "SCORE": False,
                     "ADVANCE": True, "BLOCK_C": c["block_c"], "BLOCK_K": c["block_k"], "STAGES": c["stages"],
                     "EARLY": c["early"]}  # fmt: skip
        found.append(arithmetic(compiled(_sample_head, constants, TARGETS[target][0], c["warps"]), tmp_path))
    same(found)


@pytest.mark.parametrize("file", sorted(path.stem for path in launch.FOLDER.glob("*.json")))
def test_tables_leave_nothing_to_choose_that_changes_a_sum(file):
    """Keys of a softmax state are as many whatever is asked for, and as many in a shared prefix as in an image's own
    cache; blocks of queries stay too small for the instructions of a warp group."""
    configs = launch.table(file)
    for ending in ("", "_float32"):
        if f"decode_attention{ending}" not in configs:
            continue
        rows = configs[f"decode_attention{ending}"] + configs[f"prefix_attention{ending}"]
        assert len({row["block_s"] for row in rows}) == 1
        assert file == "interpreter" or all(row["block_m"] <= WIDEST for row in configs[f"prefix_attention{ending}"])


def test_fixed_configurations_depend_on_no_size_of_a_job():
    """Only on the head dim, which a model fixes; there scores of whole sequences depend on no neighbour either."""
    for kernel, rows in launch.table("fixed").items():
        assert kernel.startswith("causal_attention") or len(rows) == 1, kernel
    assert launch.table("fixed")["cublas"][0]["from_rows"] >= 10**9
