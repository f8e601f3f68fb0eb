"""What accelerate makes of a model: changed weights are noticed, copies and wrappers work, memory is as stated."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import weakref
from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch
from accelerated import IDS, served, twins
from conftest import TINY, huggingface_model, random_weights
from transformers import ImageGPTForCausalImageModeling, ImageGPTModel

import fastigpt
from fastigpt import ImageGPTConfig
from fastigpt.integrations.hf_weights import checksum

# --- weights -----------------------------------------------------------------------------------------------------


def _train(model) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(IDS).logits.square().mean().backward()
    optimizer.step()


def _write_data(model) -> None:
    model.lm_head.weight.data.mul_(-1)  # leaves the version counter as it is


def _swap_rows(model) -> None:
    rows = model.lm_head.weight.data
    rows[[1, 7]] = rows[[7, 1]]  # the same numbers, so any sum of them is the same


def _swap_columns(model) -> None:
    columns = model.transformer.h[0].mlp.c_fc.weight.data
    columns[:, [3, 8]] = columns[:, [8, 3]]


def _swap_layers(model) -> None:
    first, second = (block.mlp.c_proj.weight.data for block in model.transformer.h)
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def _change_signs(model) -> None:
    model.lm_head.weight.data[:, 1:6:4] *= -1  # the top bit of eighteen 64-bit words: their sum stays as it was


def _write_one_number(model) -> None:
    model.transformer.h[1].mlp.c_proj.bias.data[3] += 60


def _load(model) -> None:
    model.load_state_dict(huggingface_model(TINY, random_weights(TINY, 9)).state_dict())


def _replace(model) -> None:
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())


def _convert(model) -> None:
    model.to(torch.bfloat16).float()


MOVES = [_swap_rows, _swap_columns, _swap_layers, _change_signs]
CHANGES = [_train, _write_data, _write_one_number, _load, _replace, _convert, *MOVES]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_noticed(change):
    theirs, ours = twins()
    before = served(ours, IDS, max_length=17)
    for model in (theirs, ours):
        change(model)
    expected = theirs.generate(IDS, max_length=17)
    assert torch.equal(served(ours, IDS, max_length=17), expected)
    if change is not _convert:
        assert not torch.equal(before, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_changes_places_changes_the_checksum(dtype):
    """Also across the pieces a large tensor is read in, and in the bytes that fill no word of eight."""
    values = torch.arange(300_001, dtype=torch.float64).sub(150_000).div(64).to(dtype)
    before = checksum(values)
    assert torch.equal(checksum(values.clone()), before)
    for a, b in ((0, 1), (5, 262_144), (299_999, 300_000), (0, 300_000), (2, 2 + 131_072)):
        other = values.clone()
        other[[a, b]] = other[[b, a]]
        assert torch.equal(other, values) or not torch.equal(checksum(other), before), (a, b)
        other = values.clone()
        other[[a, b]] *= -1
        assert not torch.equal(checksum(other), before), (a, b)
    blocks = torch.cat([values[150_000:], values[:150_000]])
    assert not torch.equal(checksum(blocks), before)


def test_parameters_may_be_slices_of_one_buffer():
    theirs, ours = twins()
    buffer = torch.zeros(sum(p.numel() for p in ours.parameters()) + 1)
    first = 1
    for parameter in ours.parameters():
        place = buffer[first : first + parameter.numel()].view_as(parameter)
        parameter.data = place.copy_(parameter.data)
        first += parameter.numel()
    expected = theirs.generate(IDS, max_length=17)
    assert torch.equal(served(ours, IDS, max_length=17), expected)
    buffer.neg_()
    for parameter in theirs.parameters():
        parameter.data.neg_()
    assert torch.equal(served(ours, IDS, max_length=17), theirs.generate(IDS, max_length=17))


def test_the_engine_is_kept_while_the_weights_are():
    _, ours = twins()
    engine = ours.generate.engine()
    served(ours, IDS, max_length=17)
    assert ours.generate.engine() is engine


def test_weights_are_shared_with_the_module():
    _, ours = twins(backend="portable")
    engine = ours.generate.engine()
    parameters = dict(ours.named_parameters())
    assert all(tensor.data_ptr() == parameters[name].data_ptr() for name, tensor in engine.weights.items())
    shared = {
        "token.embedding": "transformer.wte.weight",
        "positions": "transformer.wpe.weight",
        "head.weight": "lm_head.weight",
        "blocks.0.norm_1": "transformer.h.0.ln_1.weight",
    }
    weights = engine.engine.blocks.weights
    assert all(weights[ours].data_ptr() == parameters[theirs].data_ptr() for ours, theirs in shared.items())


def test_an_accelerated_model_goes_when_its_last_user_does():
    _, ours = twins()
    served(ours, IDS, max_length=17)
    gone = weakref.ref(ours)
    del ours
    assert gone() is None


def bound(model):
    return model.generate


@pytest.mark.parametrize(
    "hold",
    [
        bound,
        lambda model: partial(model.generate, max_length=17),
        lambda model: {"f": model.generate}["f"].__call__,
        lambda model: copy.deepcopy(model).generate,
        lambda model: pickle.loads(pickle.dumps(model.generate)),
        lambda model: copy.deepcopy(model.generate),
        lambda model: lambda *args, **kwargs: model.generate(*args, **kwargs),
        lambda model: fastigpt.accelerate(fastigpt.restore(model)).generate,
    ],
    ids=["bound", "partial", "kept", "of a copy", "unpickled", "copied", "closure", "again"],
)
def test_a_bound_generate_keeps_its_model(hold):
    theirs, ours = twins()
    expected = theirs.generate(IDS, max_length=17)
    call = hold(ours)
    del ours
    assert torch.equal(call(IDS, max_length=17), expected)
    assert torch.equal(twins()[1].generate(IDS, max_length=17), expected)  # a temporary


def test_a_model_goes_with_the_last_bound_generate():
    _, ours = twins()
    generate, gone = ours.generate, weakref.ref(ours)
    assert generate == ours.generate and generate.__self__ is ours and generate.__name__ == "generate"
    assert generate != twins()[1].generate
    del ours
    assert gone() is not None
    generate(IDS, max_length=17)
    del generate
    assert gone() is None


def test_an_accelerated_model_is_still_of_its_class(tmp_path):
    theirs, ours = twins()
    assert isinstance(ours, ImageGPTForCausalImageModeling) and repr(ours) == repr(theirs)
    for name in ("__name__", "__qualname__", "__module__", "config_class", "main_input_name"):
        assert getattr(type(ours), name) == getattr(type(theirs), name)
    assert ours.can_generate() and list(ours.state_dict()) == list(theirs.state_dict())
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ImageGPTForCausalImageModeling"]
    fresh = type(ours).from_pretrained(tmp_path)  # an instance that nobody accelerated
    with pytest.raises(ValueError, match="seed"):
        fresh.generate(IDS, max_length=17, seed=1)
    assert torch.equal(type(ours).generate(ours, IDS, max_length=17), theirs.generate(IDS, max_length=17))


def test_subclasses_and_wrappers_of_an_accelerated_model_work(tmp_path):
    class Own(ImageGPTForCausalImageModeling):
        def generate(self, *args, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            return super().generate(*args, **kwargs)

    theirs, _ = twins()
    own = Own(theirs.config).eval()
    own.load_state_dict(theirs.state_dict())
    expected = theirs.generate(IDS, max_length=17)
    ours = fastigpt.accelerate(own)
    assert torch.equal(served(ours, IDS, max_length=17), expected) and ours.calls == 1  # its own still prepares
    assert type(fastigpt.restore(ours)) is Own
    _, ours = twins()
    assert torch.equal(torch.compile(ours, backend="eager").generate(IDS, max_length=17), expected)
    torch.save(ours, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(served(again, IDS, max_length=17), expected) and "generate" not in vars(again)
    assert type(fastigpt.restore(again)) is ImageGPTForCausalImageModeling


def test_a_patch_of_generate_can_be_undone(monkeypatch):
    theirs, ours = twins()
    with monkeypatch.context() as patch:
        patch.setattr(ours, "generate", lambda *args: "patched")
        assert ours.generate(IDS) == "patched"
    assert torch.equal(served(ours, IDS, max_length=17), theirs.generate(IDS, max_length=17))
    assert "generate" not in vars(fastigpt.restore(ours))
    with pytest.raises(TypeError, match="hf_model"):
        fastigpt.restore("imagegpt")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_generate_from_their_own_weights(duplicate):
    theirs, ours = twins()
    other = duplicate(ours)
    _write_data(other)
    _write_data(theirs)
    assert torch.equal(served(other, IDS, max_length=17), theirs.generate(IDS, max_length=17))
    assert not torch.equal(served(ours, IDS, max_length=17), served(other, IDS, max_length=17))


# --- accelerate and restore --------------------------------------------------------------------------------------


def test_restore_gives_the_original_back_and_others_are_untouched():
    theirs, ours = twins()
    assert "generate" not in vars(theirs)
    assert fastigpt.accelerate(ours) is ours
    assert fastigpt.restore(ours) is ours and "generate" not in vars(ours)
    assert ours.generate.__func__ is ImageGPTForCausalImageModeling.generate
    assert fastigpt.restore(ours) is ours
    with pytest.raises(ValueError, match="seed"):
        ours.generate(IDS, max_length=17, seed=1)


def test_a_model_still_saves_and_scores_as_before(tmp_path):
    theirs, ours = twins()
    ours.save_pretrained(tmp_path)
    again = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)


def test_models_that_cannot_be_run_are_refused():
    weights = random_weights(TINY)
    with pytest.raises(TypeError, match="ImageGPTModel"):
        fastigpt.accelerate(ImageGPTModel(huggingface_model(TINY, weights).config))
    with pytest.raises(ValueError, match="float64"):
        fastigpt.accelerate(huggingface_model(TINY, weights).double())
    assert fastigpt.accelerate(huggingface_model(TINY, weights).double(), dtype="float32")
    with pytest.raises(ValueError, match="NaN"):
        broken = huggingface_model(TINY, weights)
        broken.lm_head.weight.data[0, 0] = float("nan")
        fastigpt.accelerate(broken)
    with pytest.raises(ValueError, match="adapted"):
        adapted = huggingface_model(TINY, weights)
        adapted.transformer.h[0].mlp.extra = torch.nn.Linear(2, 2)
        fastigpt.accelerate(adapted)
    with pytest.raises(ValueError, match="meta"):
        fastigpt.accelerate(huggingface_model(TINY, weights).to("meta"))
    other = huggingface_model(TINY, weights)
    other.config.activation_function = "gelu"
    with pytest.raises(ValueError, match="activation_function"):
        fastigpt.accelerate(other)
    patched = huggingface_model(TINY, weights)
    patched.generate = lambda: None
    with pytest.raises(ValueError, match="replaced"):
        fastigpt.accelerate(patched)


def test_transformers_is_imported_only_when_asked_for():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import fastigpt\n"
        "try: fastigpt.accelerate(object())\n"
        "except ImportError as error: assert 'pip install' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


MEMORY = """
import ctypes, gc, sys
from pathlib import Path
import torch
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling
import fastigpt

torch.set_num_threads(1)


def resident():
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what was freed and kept depends on the order of threads
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").open() if l.startswith("VmRSS"))


def model(layers, width):
    config = ImageGPTConfig(n_layer=layers, n_embd=width, n_head=8)
    return ImageGPTForCausalImageModeling(config).eval().to(getattr(torch, sys.argv[1]))


tiny = fastigpt.accelerate(model(1, 64), backend="cpu")  # whatever is imported and started once
large = model(5, 512)
before = resident()
fastigpt.accelerate(large, backend="cpu", dtype=sys.argv[2])
print(resident() - before)
"""


def cpu_engine_bytes(config: ImageGPTConfig, dtype: torch.dtype) -> int:
    """What docs/embedding.md states: matrices in dtype (int8: a float32 scale and an int32 sum for each output, and the
    head in bfloat16), embeddings, norms and biases in float32."""
    total = 0
    for name, shape in (config.tensor_shapes() | config.bias_shapes()).items():
        numbers = prod(shape)
        if len(shape) == 1 or name.endswith(("wte.weight", "wpe.weight")):
            total += 4 * numbers
        elif dtype == torch.int8:
            total += 2 * numbers if name == "lm_head.weight" else numbers + 8 * shape[1]
        else:
            total += dtype.itemsize * numbers
    return total


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident size from /proc")
@pytest.mark.parametrize(
    "module, dtype",
    [
        ("bfloat16", "bfloat16"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("float32", "float32"), ("bfloat16", "int8"))),
    ],
)
def test_the_cpu_engine_adds_the_stated_memory_and_no_more(module, dtype, tmp_path):
    command = [sys.executable, "-c", MEMORY, module, dtype]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    stated = cpu_engine_bytes(ImageGPTConfig(n_layer=5, n_head=8, n_embd=512), getattr(torch, dtype))
    assert abs(int(run.stdout.split()[-1]) - stated) < 12e6, (run.stdout, stated)


def test_the_page_states_the_memory_of_every_size_and_dtype():
    page = (Path(__file__).parents[2] / "docs" / "embedding.md").read_text()
    for name in ("small", "medium", "large"):
        sizes = [cpu_engine_bytes(ImageGPTConfig.preset(name), t) for t in (torch.float32, torch.bfloat16, torch.int8)]
        cells = [f"{b / 1e6:.0f} MB" if name == "small" else f"{b / 1e9:.2f} GB" for b in sizes]
        assert f"| {name} | {' | '.join(cells)} |" in page
