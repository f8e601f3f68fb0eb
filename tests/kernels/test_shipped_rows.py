"""Every row of every table that ships equals its twin at a real shape: the small preset's widths, heads and canvas.

The other tests of kernels look for the edges, with blocks that are small enough to have many; these run what is used.
Rows that differ only in what the interpreter has none of (warps, stages) are one there; on a GPU each of its family's
is compiled and run.
"""

import json

import pytest
import torch
from either_way import GPU, device, generator, pytestmark  # noqa: F401

pytest.importorskip("triton")

import fastigpt.ops as ops
from fastigpt.kernels import launch
from fastigpt.kernels.causal_attention import causal_attention
from fastigpt.kernels.decode_attention import decode_attention
from fastigpt.kernels.norm_linear import norm_linear
from fastigpt.kernels.prefix_attention import make_prefix
from fastigpt.ops import devices
from fastigpt.ops.causal_attention import causal_attention_reference
from fastigpt.ops.decode_attention import decode_attention_reference
from fastigpt.ops.norm_linear import norm_linear_reference

HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter gets products of bfloat16 wrong
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
HEADS, HEAD_DIM, KEYS, WIDTH = 8, 64, 1024, 512
SCHEDULING = () if GPU else ("warps", "stages")  # means nothing in the interpreter
QUICK = "sm90"  # the table whose rows for 16 bits the quick tests run; the others' are slow
NOT_LAUNCHED = ("shared_prefix", "overlap", "cublas")  # rows that say when, not how


def shipped():
    """(kernel, dtype, row, the rows before which it is chosen) of all tables, alike ones once."""
    files = [path.stem for path in sorted(launch.FOLDER.glob("*.json"), key=lambda path: path.stem != QUICK)]
    found, seen = [], set()
    for file in [launch.family(torch.device("cuda")), "fixed"] if GPU else files:
        for name, rows in launch.table(file).items():
            kernel, dtype = name.removesuffix("_float32"), torch.float32 if name.endswith("_float32") else HALF
            if kernel in NOT_LAUNCHED:
                continue
            for row in rows:
                key = kernel, dtype, json.dumps({k: v for k, v in row.items() if k not in SCHEDULING}, sort_keys=True)
                if key not in seen:
                    seen.add(key)
                    slow = [] if file == QUICK and dtype == HALF else [pytest.mark.slow]
                    sizes = " ".join(str(value) for k, value in row.items() if k not in SCHEDULING)
                    label = f"{file} {kernel} {str(dtype).removeprefix('torch.')} {sizes}"
                    found.append(pytest.param(kernel, dtype, row, id=label, marks=slow))
    return found


def alone(kernel, row):
    """A table in which this row is what is chosen for any size and dtype, beside the rows that say when."""
    row = {key: value for key, value in row.items() if not key.endswith("upto")}
    table = {name: rows for name, rows in launch.table("default").items() if not name.endswith("_float32")}
    return {**table, kernel: [row], "cublas": [{"from_rows": 10**9}], "overlap": [{"launches": False}]}


def close(got, expected, dtype):
    assert torch.isfinite(got.float()).all()
    limit = TOLERANCE[dtype] * float(expected.float().abs().max())
    torch.testing.assert_close(got.float(), expected.float(), atol=limit, rtol=0)


class Inputs:
    def __init__(self, generator, device):
        self.generator, self.device = generator, device

    def normal(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)


def check_norm_linear(inputs, dtype, row, table):
    """The projection behind attention, of as many rows as the row is for; and one row less, which fills no block."""
    rows = row.get("upto", 2 * row["block_m"])
    x, weight = inputs.normal(rows, WIDTH), (inputs.normal(WIDTH, WIDTH) / WIDTH**0.5).to(dtype)
    gain = inputs.normal(WIDTH)
    for n in {rows, max(1, rows - 1)}:
        out = torch.full((n, WIDTH), float("nan"), device=inputs.device)
        expected = norm_linear_reference(x[:n], weight, out.clone(), gain=gain)
        close(norm_linear(x[:n].contiguous(), weight, out, configs=table, gain=gain), expected, dtype)


def check_decode(inputs, dtype, row, table, window):
    """A canvas at its end, and if the row is for more than one, one early in it, which leaves split keys empty."""
    lanes = 1 if row.get("upto", 1000) <= 2 * HEADS else 2
    q = inputs.normal(lanes, window, HEADS, HEAD_DIM, dtype=dtype)
    k, v = (inputs.normal(lanes, HEADS, KEYS, HEAD_DIM, dtype=dtype) for _ in range(2))
    slots = torch.tensor([KEYS - window, 40][:lanes], dtype=torch.int32, device=inputs.device)
    close(decode_attention(q, k, v, slots, configs=table), decode_attention_reference(q, k, v, slots), dtype)


def check_prefix_attention(inputs, dtype, row, table):
    """Results of one completion, half of the canvas known."""
    lanes, known = 3, KEYS // 2
    q = inputs.normal(lanes, 1, HEADS, HEAD_DIM, dtype=dtype)
    k, v = (inputs.normal(lanes, HEADS, 16, HEAD_DIM, dtype=dtype) for _ in range(2))
    prefix_k, prefix_v = (inputs.normal(1, HEADS, known, HEAD_DIM, dtype=dtype) for _ in range(2))
    lengths = torch.tensor([known], dtype=torch.int32, device=inputs.device)
    slots = torch.tensor([0, 15, 7], dtype=torch.int32, device=inputs.device)
    prefix = make_prefix(prefix_k, prefix_v, lengths, [0] * lanes, 1, table, dtype)
    got = decode_attention(q, k, v, slots, configs=table, prefix=prefix)
    expected = decode_attention_reference(
        q, k, v, slots, prefix_k=prefix_k, prefix_v=prefix_v, lengths=lengths, source=[0] * lanes
    )
    close(got, expected, dtype)


def check_causal_attention(inputs, dtype, row, table):
    length, head_dim = KEYS // 4, row.get("upto", 256)
    q, k, v = (inputs.normal(1, length, 2, head_dim, dtype=dtype) for _ in range(3))
    close(causal_attention(q, k, v, configs=table), causal_attention_reference(q, k, v), dtype)


def check_sample_head(inputs, dtype, row, table, monkeypatch):
    """512 colours of 16 images, with and without filters: the tokens of the operator on the CPU. Hidden states that are
    rounded to 16 bits may move one of them, hence inputs that are the same in every run."""
    inputs.generator.manual_seed(0)
    hidden, gain, weight = inputs.normal(16, WIDTH), inputs.normal(WIDTH), inputs.normal(512, WIDTH) / 8
    arguments = [hidden, gain, weight.to(dtype), torch.arange(16) + 2**33, 64 * torch.arange(16), 2**63 + 1]
    for options in ({}, {"top_k": 100, "top_p": 0.9}):
        cpu = [x.cpu().float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
        expected = ops.sample_head(*cpu, **options)
        moved = [x.to(inputs.device) if isinstance(x, torch.Tensor) else x for x in arguments]
        with monkeypatch.context() as patched:
            patched.setattr(devices, "by_triton", lambda x: True)
            patched.setattr(devices, "launch_configs", lambda x: table)
            right = int((ops.sample_head(*moved, **options).cpu() == expected).sum())
        assert right >= (16 if dtype == torch.float32 else 15)


@pytest.mark.parametrize("kernel, dtype, row", shipped())
def test_every_shipped_row_equals_its_twin_at_a_real_shape(generator, device, monkeypatch, kernel, dtype, row):
    inputs, table = Inputs(generator, device), alone(kernel, row)
    if kernel == "norm_linear":
        check_norm_linear(inputs, dtype, row, table)
    elif kernel in ("decode_attention_1", "decode_attention"):
        check_decode(inputs, dtype, row, table, 1 if kernel == "decode_attention_1" else 8)
    elif kernel == "prefix_attention":
        check_prefix_attention(inputs, dtype, row, table)
    elif kernel == "causal_attention":
        check_causal_attention(inputs, dtype, row, table)
    else:
        assert kernel == "sample_head", f"a table has rows for {kernel}, which nothing here runs"
        check_sample_head(inputs, dtype, row, table, monkeypatch)
