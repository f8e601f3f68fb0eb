"""What launches that overlap read before they wait for the kernel before them: weights, and nothing a pass writes.

Read from what the compiler makes for sm_90: in PTX every address is traced to the arguments it comes from; in the
machine's code the loads must stand on the same side of the wait.
"""

import re
import subprocess

import pytest

pytest.importorskip("triton")

import test_compile
from test_compile import TARGETS, TOOLS, cases, compiled

from fastigpt.kernels import launch
from fastigpt.kernels.choose_rows import choose_rows
from fastigpt.kernels.decode_attention import _decode_attention
from fastigpt.kernels.kv_cache import _append_kv
from fastigpt.kernels.norm_linear import _finish, _norm, _norm_linear
from fastigpt.kernels.prefix_attention import _prefix_attention
from fastigpt.kernels.sample_head import _sample_head

if launch.interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

CONSTANT = {"weight", "gain", "bias"}  # what no kernel of a pass writes


def overlapping(kernel, name=""):
    """A kernel as it is launched where launches overlap, with the shipped configuration of a case of that name; its
    arguments, and those of them that are memory."""
    case = next(case for case in cases(launch.table("sm90"), "*bf16") if case[1] is kernel and name in case[0])
    _, _, constants, warps, cache = case
    constants = {**constants, "OVERLAP": True}
    types = test_compile.argument_types(kernel, constants, "*bf16", cache)
    arguments = [each for each in kernel.arg_names if types[each] != "constexpr"]
    made = compiled(kernel, constants, TARGETS["sm90"][0], warps, cache=cache, launch_pdl=True)
    return made, arguments, [each for each in arguments if types[each][0] == "*"]


def accesses(ptx, arguments):
    """Everything that reads memory, in order: (wait | load | prefetch, arguments that its address comes from)."""
    sources, found = {}, []
    for line in ptx.splitlines():
        code = re.sub(
            r"^(@!?%p\d+\s+|\{.*@p )", "", line.strip()
        )  # a predicate, or all that stands in our own assembler
        if code.startswith("griddepcontrol.wait"):
            found.append(("wait", frozenset()))
        parameter = re.match(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)", code)
        registers = re.findall(r"%\w+", code)
        if parameter:
            number = int(parameter[2])
            sources[parameter[1]] = frozenset(arguments[number : number + 1])
        elif re.match(r"(ld\.global|cp\.async\.c\w\.|prefetch)", code):
            address = re.findall(r"\[\s*(%rd\d+)", code)[-1]
            found.append(("prefetch" if "prefetch" in code else "load", sources.get(address, frozenset())))
            if code.startswith("ld.global"):
                for register in re.findall(r"%\w+", code.split("[")[0]):
                    sources[register] = frozenset()  # a loaded number: where it was loaded from is noted already
        elif len(registers) > 1 and not code.startswith(("st.", "bar", "setp")):
            came = frozenset().union(*(sources.get(each, frozenset()) for each in registers[1:]))
            sources[registers[0]] = sources.get(registers[0], frozenset()) | came
    return [(kind, names & set(arguments)) for kind, names in found]


def pointers(found, arguments):
    return {name for _, names in found for name in names if name in arguments}


def sides(kernel, name=""):
    """Arguments whose memory is (loaded, prefetched) before the wait, loaded after it, and the compiled kernel."""
    made, arguments, memory = overlapping(kernel, name)
    found = accesses(made.asm["ptx"], arguments)
    at = [kind for kind, _ in found].index("wait")
    assert [kind for kind, _ in found].count("wait") == 1
    early = [each for each in found[:at] if each[0] == "load"]
    asked = [each for each in found[:at] if each[0] == "prefetch"]
    return pointers(early, memory), pointers(asked, memory), found[at + 1 :], made


def machine_code(made, tmp_path):
    path = tmp_path / "kernel.cubin"
    path.write_bytes(made.asm["cubin"])
    return subprocess.run([TOOLS / "nvdisasm", path], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["qkv", "fc", "proj", "out"])
def test_weights_are_loaded_before_the_wait_and_activations_after_it(layer, tmp_path):
    early, asked, after, made = sides(_norm_linear, f"norm_linear {layer} rows=1")
    assert "weight" in early and early <= CONSTANT
    assert asked == ({"weight"} if layer == "out" else set())  # of a layer with few columns all are loaded
    late = {name for _, names in after for name in names}
    assert "x" in late and not late & {"gain", "bias"}
    code = machine_code(made, tmp_path)
    before, behind = code.split("ACQBULK")
    assert "PREEXIT" in before and re.search(r"LDG\.E\S*\.128", before) and "LDG" in behind and "HMMA" not in before
    assert before.rindex("LDG.E") < before.index("PREEXIT")  # this launch's weights before the next launch's
    assert ("CCTL.E.PF2" in before) == (layer == "out") and "CCTL.E.PF2" not in behind


@pytest.mark.slow
@pytest.mark.parametrize("layer, operand", [("qkv", "slots"), ("proj", "out"), ("out", "out")])
def test_small_operands_are_loaded_first(layer, operand):
    """What is needed at the end is on its way before the activations and the rest of the weights are asked for."""
    _, _, after, _ = sides(_norm_linear, f"norm_linear {layer} rows=1")
    order = [names for kind, names in after if kind == "load"]
    assert operand in order[0] and any("x" in names for names in order)
    assert not any(operand in names for names in order[len([n for n in order if operand in n]) :])


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["fc", "out"])
def test_all_weights_of_one_row_are_asked_for_in_one_round(layer):
    """As many loads of 16 bytes by each thread as its program's weights are stand before the first product."""
    name = f"norm_linear {layer} rows=1"
    made, arguments, _ = overlapping(_norm_linear, name)
    constants = next(case[2] for case in cases(launch.table("sm90"), "*bf16") if case[0] == name)
    found = accesses(made.asm["ptx"].split("mma.sync")[0], arguments)
    loads = sum("weight" in names for kind, names in found if kind == "load")
    assert loads * 16 * 32 * made.metadata.num_warps == 2 * constants["K"] * constants["BLOCK_N"]


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
def test_no_layer_of_the_small_model_leaves_most_of_a_gpu_idle(rows):
    configs = launch.table("sm90")
    for k, n in ((512, 1536), (512, 512), (512, 2048), (2048, 512)):
        c = launch.settings(configs, "norm_linear", rows, k=k, n=n)
        assert -(-n // c["block_n"]) * -(-rows // c["block_m"]) >= 64
    assert all(row["stages"] >= 3 for row in configs["decode_attention"])  # of two, one would wait for the other


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel, name, early",
    [
        (_sample_head, "sample_head 512 W=1", {"weight", "gain"}),
        (_norm, "", {"gain"}),
        (_finish, "finish quick_gelu", set()),
        (_append_kv, "", set()),
        (_prefix_attention, "", set()),
        (choose_rows, "", set()),
        (_decode_attention, "decode_attention 64 W=1 splits=16", {"slots"}),
    ],
)
def test_every_kernel_of_a_pass_takes_part(kernel, name, early):
    """The place of an image is read twice: before the wait to ask for keys, which changes nothing, then to be used."""
    found, asked, after, _ = sides(kernel, name)
    assert found == early
    assert asked == ({"k", "v"} if kernel is _decode_attention else set())
    late = {each for _, names in after for each in names}
    assert late and "gain" not in late and ("slots" in late or "slots" not in early)
