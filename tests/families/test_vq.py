"""The VQ codec is held to LlamaGen's own code and to transformers' JanusVQVAE."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import JanusVQVAE, JanusVQVAEConfig

from fastigpt import _C
from fastigpt.codecs import UNKNOWN, patch, vq
from fastigpt.codecs.vq import CODEBOOK, VQCodec, VQConfig

GOLDEN = Path(__file__).parent / "llamagen_golden"
DS8 = VQConfig(32, (1, 1, 2, 2), 2, 64, 256, 8)
TINY = VQConfig(32, (1, 2), 1, 32, 20, 4)


def golden_codec() -> VQCodec:
    weights = torch.load(GOLDEN / "vq_tiny_ds8.pt", weights_only=True)["model"]
    return VQCodec(DS8, weights, 8, 8, half=0.5)


def random_vq(config: VQConfig = TINY, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in config.tensor_shapes().items():
        noise = torch.randn(shape, generator=generator)
        norm = "norm" in name and name.endswith("weight")
        found[name] = 1 + 0.1 * noise if norm else noise / max(1, np.prod(shape[1:])) ** 0.5
    return found


def their_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in weights.items():
        for ours, theirs in (("mid.0.", "mid.block_1."), ("mid.1.", "mid.attn_1."), ("mid.2.", "mid.block_2.")):
            name = name.replace(ours, theirs)
        side = "down" if name.startswith("encoder") else "up"
        found[name.replace("conv_blocks", side).replace(".res.", ".block.")] = tensor
    return found


def their_vq(config: VQConfig, weights: dict[str, torch.Tensor], grid: int) -> JanusVQVAE:
    theirs = JanusVQVAEConfig(
        embed_dim=config.code_dim, num_embeddings=config.n_codes, latent_channels=config.latent,
        num_patches=grid, base_channels=config.base, channel_multiplier=list(config.multipliers),
        num_res_blocks=config.res_blocks,
    )  # fmt: skip
    model = JanusVQVAE(theirs).eval()
    model.load_state_dict(their_names(weights))
    return model


def test_decodes_and_encodes_as_llamagen_does():
    figures, codec = np.load(GOLDEN / "vq_tiny_ds8.npz"), golden_codec()
    codes = torch.from_numpy(figures["codes"])
    for row, expected in zip(codes, figures["pixels"]):
        assert np.abs(codec.pixels(codec._entries[row]).permute(2, 0, 1).numpy() - expected).max() <= 1e-4
    levels = np.clip(127.5 * figures["pixels"] + 128, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    assert (np.abs(codec.decode(codes).astype(int) - levels.astype(int)) <= 1).all()
    assert (codec.decode(codes) == levels).mean() > 0.999
    images = np.rint((figures["image"].transpose(0, 2, 3, 1) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    # Theirs was encoded before it was rounded to levels: a code may turn on that.
    assert (codec.encode(images).numpy() == figures["encoded"]).mean() >= 0.95


@pytest.mark.parametrize("multipliers", [(1, 2), (1, 1, 2)])
def test_decodes_and_encodes_as_transformers_do(multipliers):
    config = VQConfig(32, multipliers, 1, 32, 20, 4)
    weights = random_vq(config)
    weights[CODEBOOK] = torch.nn.functional.normalize(weights[CODEBOOK], dim=-1)  # where theirs has no mistake
    codec, theirs = VQCodec(config, weights, 3, 3), their_vq(config, weights, 3)
    tokens = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(1))
    images = np.random.default_rng(0).integers(0, 256, (2, *codec.size, 3), dtype=np.uint8)
    with torch.inference_mode():
        pixels = theirs.decode(tokens)
        given = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = theirs.quant_conv(theirs.encoder(given))
        latents = torch.nn.functional.normalize(latents, dim=1)
        codes = theirs.quantize(latents)[2].view(2, -1)
    for row, expected in zip(tokens, pixels):
        assert (codec.pixels(codec._entries[row]).permute(2, 0, 1) - expected).abs().max() <= 1e-4
    assert torch.equal(codec.encode(images), codes) and len(codes.unique()) > 3
    truncated = ((pixels + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (codec.decode(tokens) == truncated).mean() > 0.99


def test_an_image_looks_the_same_in_whatever_company():
    codec = VQCodec(TINY, random_vq(), 4, 5)
    tokens = torch.randint(0, 20, (5, 20), generator=torch.Generator().manual_seed(1))
    together = codec.decode(tokens)
    assert together.shape == (5, 8, 10, 3) and together.std() > 10
    codes = codec.encode(together)
    for i in range(5):
        assert np.array_equal(codec.decode(tokens[i : i + 1])[0], together[i])
        assert torch.equal(codec.encode(together[i : i + 1])[0], codes[i])
    assert codec.decode(tokens[:0]).shape == (0, 8, 10, 3) and codec.encode(together[:0]).shape == (0, 20)


def test_previews_are_grey_where_nothing_is_known_and_finished_where_all_is():
    codec = VQCodec(TINY, random_vq(), 4, 4)
    tokens = torch.randint(0, 20, (3, 16), generator=torch.Generator().manual_seed(1))
    assert np.array_equal(codec.preview(tokens), codec.decode(tokens))
    tokens[0], tokens[1, 8:] = -1, -1
    seen = codec.preview(tokens)
    assert (seen[0] == UNKNOWN).all() and (seen[1, 4:] == UNKNOWN).all() and patch(codec) == (2, 2)
    assert (seen[1, :4] != UNKNOWN).any() and np.array_equal(seen[2], codec.decode(tokens[2:])[0])


def test_known_tokens_look_in_previews_as_if_the_picture_went_on_like_them():
    codec = VQCodec(TINY, random_vq(), 4, 4)
    columns = torch.randint(0, 20, (2, 1, 4), generator=torch.Generator().manual_seed(1)).expand(-1, 4, -1)
    whole, known = codec.decode(columns.flatten(1)), columns.clone()
    known[0, 2:], known[1, :3] = -1, -1
    seen = codec.preview(known.flatten(1))
    assert np.array_equal(seen[0, :4], whole[0, :4]) and np.array_equal(seen[1, 6:], whole[1, 6:])
    assert (seen[0, 4:] == UNKNOWN).all() and (seen[1, :6] == UNKNOWN).all()
    one = torch.full((1, 16), -1)
    one[0, 6] = 7
    corner = np.s_[0, 2:4, 4:6]
    assert np.array_equal(codec.preview(one)[corner], codec.decode(torch.full((1, 16), 7))[corner])


def test_codecs_are_equal_if_their_tokens_mean_the_same():
    codec, again = (VQCodec(TINY, random_vq(), 4, 4) for _ in range(2))
    assert codec == again == pickle.loads(pickle.dumps(codec)) and hash(codec) == hash(again)
    assert codec != VQCodec(TINY, random_vq(seed=1), 4, 4) and codec != VQCodec(TINY, random_vq(), 4, 5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pixels_in_bfloat16_are_those_in_float32_but_for_rounding(stored, monkeypatch):
    monkeypatch.setattr(vq, "_multiplies_bfloat16", lambda device: True)
    cpu = torch.device("cpu")
    exact = VQCodec(TINY, {name: tensor.to(stored) for name, tensor in random_vq().items()}, 4, 5)
    half = exact.on(cpu, torch.int8)
    assert (exact.dtype, half.dtype) == (torch.float32, torch.bfloat16) and half == exact
    assert exact.on(cpu, torch.float32) is exact and half.on(cpu, torch.float16) is half
    assert half.on(cpu, torch.float64).dtype == torch.float32
    tokens = torch.randint(0, 20, (3, 20), generator=torch.Generator().manual_seed(1))
    expected, found = exact.decode(tokens), half.decode(tokens)
    error = np.abs(found.astype(int) - expected)
    assert 0 < error.mean() < 1.5 and error.max() < 16 and expected.std() > 10
    assert np.array_equal(half.decode(tokens[1:2])[0], found[1]) and np.array_equal(half.preview(tokens), found)
    assert torch.equal(half.encode(expected), exact.encode(expected))


def test_pixels_stay_in_float32_where_bfloat16_is_not_multiplied(monkeypatch):
    monkeypatch.setattr(vq, "_multiplies_bfloat16", lambda device: False)
    codec = VQCodec(TINY, random_vq(), 4, 4)
    assert codec.on(torch.device("cpu"), torch.bfloat16) is codec
    monkeypatch.undo()
    fast = "avx512vnni" in _C.supported_isas()
    assert codec.on(torch.device("cpu"), torch.bfloat16).dtype == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.gpu
def test_pixels_are_made_on_a_gpu():
    codec = VQCodec(TINY, random_vq(), 4, 5)
    tokens = torch.randint(0, 20, (3, 20), generator=torch.Generator().manual_seed(1))
    expected = codec.decode(tokens)
    for dtype in (torch.float32, torch.bfloat16):
        there = codec.on(torch.device("cuda"), dtype)
        found = there.decode(tokens)
        assert there.device.type == "cuda" and np.abs(found.astype(int) - expected).mean() < 1.5
        assert np.array_equal(there.decode(tokens[1:2])[0], found[1])
        assert torch.equal(there.encode(expected), codec.encode(expected))


def test_autocast_changes_nothing():
    codec = VQCodec(TINY, random_vq(), 4, 4)
    tokens = torch.arange(16)[None]
    expected = codec.decode(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(codec.decode(tokens), expected)
        assert torch.equal(codec.encode(expected), VQCodec(TINY, random_vq(), 4, 4).encode(expected))
