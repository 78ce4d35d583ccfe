"""transformers reads what we write and we read what it writes, with equal logits."""

import json

import pytest
import torch

from dgemma.checkpoints.load import load_model

transformers = pytest.importorskip("transformers")


@torch.no_grad()
def assert_equal_logits(model, reference, inputs):
    """A first step, and one conditioned on the same logits on both sides, behind a prompt longer than the window."""
    tokens, canvas = inputs(model.config.vocab_size)
    cache = model.new_cache()
    model.encode(tokens, cache)
    ours = model.denoise(canvas, cache)
    theirs = reference(input_ids=tokens, decoder_input_ids=canvas).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    previous = theirs / 0.8
    ours = model.denoise(canvas, cache, previous)
    theirs = reference(input_ids=tokens, decoder_input_ids=canvas, self_conditioning_logits=previous).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def from_pretrained(directory, **options):
    kind = transformers.DiffusionGemmaForBlockDiffusion
    return kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **options)


@pytest.mark.parametrize("shard", [5_000_000_000, 20_000])
def test_transformers_loads_what_we_save(make_model, saved, inputs, shard):
    model = make_model()
    reference, info = from_pretrained(saved(model, max_shard_bytes=shard))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert_equal_logits(model, reference.eval(), inputs)
    tower = reference.model.encoder.vision_tower.state_dict()
    assert torch.equal(tower["std_bias"], model.vision.std_bias)


def test_transformers_loads_text_only(make_model, saved, inputs):
    """It has no network without a tower: given a small one it starts that at random, and the text is equal."""
    model = make_model(vision=False)
    directory = saved(model)
    assert json.loads((directory / "config.json").read_text())["vision_config"] is None
    config = transformers.DiffusionGemmaConfig.from_pretrained(directory)
    config.vision_config = transformers.Gemma4VisionConfig(**make_model(vision=True).config.vision.source)
    reference, info = from_pretrained(directory, config=config)
    assert not info["unexpected_keys"]
    assert all(".vision_tower." in name or ".embed_vision." in name for name in info["missing_keys"])
    assert_equal_logits(model, reference.eval(), inputs)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_we_load_what_transformers_saves(make_model, saved, inputs, tmp_path, shard):
    reference, _ = from_pretrained(saved(make_model()))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        reference.model.encoder.language_model.layers[0].layer_scalar.fill_(1.3)
        reference.model.decoder.layers[1].layer_scalar.fill_(0.6)
    written = tmp_path / "theirs"
    reference.eval().save_pretrained(written, max_shard_size=shard)
    text = json.loads((written / "config.json").read_text())["text_config"]
    assert "per_layer_config" in text
    assert (written / "model.safetensors.index.json").exists() == (shard == "20KB")
    assert_equal_logits(load_model(written, "cpu"), reference, inputs)
