"""The benchmark's arithmetic: floors counted from shapes, whole images from three passes, ratios only where there is
one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, random_weights
from PIL import Image
from typer.testing import CliRunner

from fastigpt import ImageGPT, ImageGPTConfig, Palette
from fastigpt.bench.floor import kv_bytes_per_token, matrix_parameters, parameters, pass_floor
from fastigpt.bench.machine import measure_machine
from fastigpt.bench.measure import Timing, ratio, whole_images
from fastigpt.bench.models import SHAPES, of
from fastigpt.bench.peers import EnginePeer, LlamaPeer, TransformersPeer
from fastigpt.bench.timing import typical
from fastigpt.cli import app
from fastigpt.families import image_gpt
from fastigpt.kernels.launch import SCALED_TYPES
from fastigpt.spec import BlockSpec

SMALL = ImageGPTConfig.preset("small")


def test_the_floor_counts_what_a_pass_must_move_and_compute():
    floor = pass_floor(
        image_gpt.spec(SMALL),
        n=3,
        position=100,
        window=2,
        dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16,
        bandwidth=1e9,
        gemm=1e12,
    )
    matrices = 24 * 12 * 512 * 512 + 512 * 512  # blocks and the head; embeddings are looked up
    assert floor.bytes == 2 * matrices + 3 * 100 * 2 * 24 * 512 * 2
    assert floor.operations == 2 * matrices * 3 * 2 + 4 * 3 * 2 * 100 * 512 * 24
    assert floor.memory_seconds == floor.bytes / 1e9 and floor.compute_seconds == floor.operations / 1e12
    assert floor.seconds == max(floor.memory_seconds, floor.compute_seconds)
    assert kv_bytes_per_token(image_gpt.spec(SMALL), torch.bfloat16) * 1024 == pytest.approx(50.3e6, rel=1e-3)
    assert kv_bytes_per_token(image_gpt.spec(SMALL), torch.int8) == 2 * 24 * (512 + 4 * 8)


@pytest.mark.parametrize("kv_dtype", list(SCALED_TYPES), ids=str)
def test_the_scales_of_every_eight_bit_cache_count_in_the_floor(kv_dtype):
    spec = image_gpt.spec(TINY)
    assert kv_bytes_per_token(spec, kv_dtype) == 2 * spec.n_layer * spec.block.n_head * (spec.block.head_dim + 4)


def test_whole_images_are_exact_where_time_is_linear_in_the_position():
    def line(p: int) -> float:
        return 3.0 + 0.5 * p

    positions = (32, 512, 992)
    total = whole_images(positions, [line(p) for p in positions], 1024)
    assert total == pytest.approx(sum(line(p) for p in range(1024)))


def timing(seconds: list[float]) -> Timing:
    return Timing("x", 1, "float32", "float32", 1, [1, 8, 15], [seconds] * 3, [], 16)


def test_a_ratio_is_only_printed_where_the_spread_allows_one():
    fast, slow = timing([1.0, 1.0, 1.01, 1.0]), timing([2.0, 2.0, 2.01, 2.0])
    assert ratio(slow, fast) == "2.00×"
    noisy = timing([0.8, 1.0, 1.3, 1.1])
    assert ratio(noisy, fast) == "within noise"
    assert typical([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, pytest.approx(1 / 3))


def test_the_machines_limits_are_plausible():
    machine = measure_machine(torch.device("cpu"))
    assert 1e8 < machine.bandwidth < 1e13
    assert all(1e8 < rate < 1e16 for rate in machine.gemm.values())
    assert 0 <= machine.spread["bandwidth"] < float("inf")  # how quiet the machine is decides


def test_every_peer_runs_the_same_pass_again_and_again():
    engine = ImageGPT(TINY, random_weights(TINY)).engine
    peers = [EnginePeer(engine), TransformersPeer(TINY, torch.device("cpu"), torch.float32)]
    for peer in peers:
        work = peer.prepared_pass(n=2, position=5)
        for _ in range(12):  # a cache that grew would run past the last position
            work()


def test_bench_prints_a_table_and_writes_json_and_a_plot(tmp_path):
    palette = Palette(np.random.default_rng(2).uniform(-1, 1, (9, 3)).astype(np.float32))
    ImageGPT(TINY, random_weights(TINY), palette=palette).save_pretrained(tmp_path / "tiny")
    arguments = ["bench", "-m", str(tmp_path / "tiny"), "-n", "1,2", "--rounds", "1"]
    arguments += ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "transformers" in result.output and "GB/s" in result.output and "of floor" in result.output
    figures = json.loads((tmp_path / "b.json").read_text())
    assert {t["peer"] for t in figures["timings"]} >= {"transformers", "fastigpt portable"}
    assert all(t["seconds"] > 0 and t["floor_seconds"] > 0 for t in figures["timings"])
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.width > 500


def test_windows_are_divided_by_what_they_decide_and_not_by_their_width():
    known = Timing("x", 2, "float32", "float32", 8, [1, 8, 15], [[1.0]] * 3, [], 16, tokens_per_pass=3.2)
    assert known.seconds() == pytest.approx(16 / 3.2) and known.images_per_minute() == pytest.approx(60 * 2 / 5)
    unknown = Timing("x", 2, "float32", "float32", 8, [1, 8, 15], [[1.0]] * 3, [], 16, tokens_per_pass=None)
    assert unknown.seconds() is None and unknown.images_per_minute() is None and ratio(unknown, known) == "–"
    assert EnginePeer(ImageGPT(TINY, random_weights(TINY)).engine, window=4).tokens_per_pass is None


def test_bench_measures_how_many_guesses_of_a_trained_model_are_right(tmp_path, monkeypatch):
    model = ImageGPT(TINY, random_weights(TINY, scale=0.0))  # each token is as likely as any other
    model.save_pretrained(tmp_path / "even")
    limits = measure_machine(torch.device("cpu"))
    monkeypatch.setattr("fastigpt.bench.measure.measure_machine", lambda device: limits)
    monkeypatch.setattr("fastigpt.bench.run.timed_positions", lambda config: [1, 4, 8])
    arguments = ["bench", "-m", str(tmp_path / "even"), "-n", "1", "--rounds", "1", "--window", "4"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "b.json")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    timings = {t["peer"]: t for t in json.loads((tmp_path / "b.json").read_text())["timings"]}
    ours = next(t for name, t in timings.items() if name not in ("transformers", "fastigpt portable"))
    _, stats = ImageGPT(TINY, model.weights).sample(8, seed=0, window=4, output_type="tokens", return_stats=True)
    assert ours["window"] == 4 and ours["tokens_per_pass"] == pytest.approx(stats.tokens_per_pass)
    assert timings["transformers"]["window"] == timings["fastigpt portable"]["window"] == 1


def test_bench_of_random_weights_with_windows_gives_passes_and_no_images(tmp_path, monkeypatch):
    preset = replace(of(ImageGPT.from_config(TINY, backend="reference").pretrained), pretrained=None)
    monkeypatch.setattr("fastigpt.bench.run._load", lambda model: preset)
    limits = measure_machine(torch.device("cpu"))
    monkeypatch.setattr("fastigpt.bench.measure.measure_machine", lambda device: limits)
    monkeypatch.setattr("fastigpt.bench.run.timed_positions", lambda config: [1, 4, 8])
    arguments = ["bench", "-m", "small", "-n", "1", "--rounds", "1", "--window", "4", "--no-peers"]
    arguments += ["--json", str(tmp_path / "b.json")]
    with pytest.raises(ValueError, match="trained"):
        CliRunner().invoke(app, [*arguments, "--plot", str(tmp_path / "b.png")], catch_exceptions=False)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "random weights" in result.output
    (ours,) = json.loads((tmp_path / "b.json").read_text())["timings"]
    assert ours["seconds"] is ours["images_per_minute"] is None and min(ours["milliseconds"]) > 0


def test_floors_of_published_shapes_are_those_of_their_weights():
    """The image head and the blocks, and keys and values of both branches."""
    janus = SHAPES["janus-pro-1b"]
    assert matrix_parameters(janus) == 24 * (4 * 2048**2 + 3 * 2048 * 5632) + 2048**2 + 16384 * 2048
    assert kv_bytes_per_token(janus, torch.bfloat16) == 192 * 1024
    assert 1.51e9 < parameters(janus) < 1.52e9 and 0.33e9 < parameters(SHAPES["llamagen-l"]) < 0.37e9
    assert SHAPES["llamagen-3b"].block.head_dim == 100


def test_bench_measures_the_shape_of_a_published_model_beside_transformers(tmp_path, monkeypatch):
    tiny = replace(SHAPES["janus-pro-1b"], n_layer=2, width=32, n_tokens=40, n_prefix_tokens=9, height=4, columns=4,
                   prefix_length=20, head_inner=32, block=BlockSpec(4, 2, 8, 48, 1e-6, "gated_silu"))  # fmt: skip
    monkeypatch.setitem(SHAPES, "llamagen-b", tiny)
    limits = measure_machine(torch.device("cpu"))
    monkeypatch.setattr("fastigpt.bench.measure.measure_machine", lambda device: limits)
    rows = []
    run = LlamaPeer.prepared_pass
    monkeypatch.setattr(LlamaPeer, "prepared_pass", lambda *a, **k: rows.append(k["n"]) or run(*a, **k))
    arguments = ["bench", "-m", "llamagen-b", "-n", "1,3", "--rounds", "1", "--json", str(tmp_path / "b.json")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "guided: two sequences an image" in result.output and set(rows) == {2, 6}
    figures = json.loads((tmp_path / "b.json").read_text())
    assert {t["peer"] for t in figures["timings"]} >= {"transformers", "fastigpt portable"}
    assert figures["config"]["n_layer"] == 2
    floor = next(t["floors"][0] for t in figures["timings"] if t["peer"] == "transformers" and t["n"] == 3)
    position = next(t["positions"][0] for t in figures["timings"])
    assert floor["bytes"] == 2 * matrix_parameters(tiny) + 6 * position * kv_bytes_per_token(tiny, torch.bfloat16)


@pytest.mark.parametrize("more", [[], ["--no-peers"]])
def test_a_model_that_does_not_fit_is_refused_before_anything_is_made(monkeypatch, more):
    monkeypatch.setattr("fastigpt.bench.run.free_memory", lambda device: 10 << 30)
    named = "13.* GB for the weights of all 1" if more else "39.* GB for the weights of all 3 .* --no-peers"
    with pytest.raises(ValueError, match=f"janus-pro-7b needs {named}"):
        CliRunner().invoke(app, ["bench", "-m", "janus-pro-7b", "-n", "1", *more], catch_exceptions=False)
