"""transformers as an engine under test: the public reference, with recorded draws in place of its own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

from dgemma.config import GenerationConfig, ModelConfig
from dgemma.conformance.adapter import Answer, Block, Encoded, Prompt, Request
from dgemma.conformance.ours import Replayed
from dgemma.decoding.noise import Noise
from dgemma.picture import Picture

TOWER = {
    "model_type": "gemma4_vision",
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "global_head_dim": 12,
    "patch_size": 4,
    "position_embedding_size": 4,
}
"""It cannot be built without an image tower; where a checkpoint has none, this one is never used."""


class Transformers:
    """Rows one by one: it has no batch of unequal prompts without padding."""

    def load(self, directory: Path) -> None:
        self.config = ModelConfig.from_file(directory / "config.json")
        self.defaults = GenerationConfig.from_file(directory / "generation_config.json")
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.model = build(values, load_file(directory / "model.safetensors"))

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[Prompt], canvas: np.ndarray, previous: np.ndarray | None, shared: int
    ) -> list[Encoded]:
        rows = []
        for b, prompt in enumerate(prompts):
            cache: Any = transformers.DynamicCache(config=self.model.config.get_text_config(decoder=True))
            for piece in [prompt.tokens] if prompt.pictures else prompt.pieces:
                tokens = torch.tensor([piece])
                given = self._shown(prompt, cache) if prompt.pictures else {}
                self.model.model.encoder(input_ids=tokens, past_key_values=cache, **given)
            held = [[layer.keys[0].numpy().copy(), layer.values[0].numpy().copy()] for layer in cache.layers]
            out = self.model(
                decoder_input_ids=torch.from_numpy(canvas[b : b + 1]),
                past_key_values=cache,
                self_conditioning_logits=None if previous is None else torch.from_numpy(previous[b : b + 1]),
            )
            rows.append(Encoded(out.logits[0].numpy(), *map(list, zip(*held, strict=True))))
        return rows

    def generate(self, requests: Sequence[Request], shared: int) -> list[Answer]:
        answers = []
        for request in requests:
            prompt = torch.tensor([request.prompt.tokens])
            options = self.defaults.with_options(**request.options)
            noise = Replayed(request.noise, self.config.vocab_size, self.config.canvas_length)
            given = images([p.picture for p in request.prompt.pictures]) if request.prompt.pictures else {}
            if given:
                given["mm_token_type_ids"] = prompt.eq(self.config.image_token_id or 0).long()
            (blocks,), out = generate(self.model, prompt, options, [noise], **given)
            tokens = out.sequences[0, prompt.shape[1] :].tolist()
            ends = [i for i, token in enumerate(tokens) if token in options.eos_token_id]
            # It returns whole canvases.
            kept = tokens[: ends[0] + 1] if ends else tokens
            answers.append(Answer(blocks, kept[: options.max_new_tokens]))
        return answers

    def _shown(self, prompt: Prompt, cache: Any) -> dict[str, Any]:
        """Pixels, and the masks that its `generate` makes for them."""
        tokens = torch.tensor([prompt.tokens])
        masks = self.model.model.encoder.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty(*tokens.shape, 0),
            attention_mask=None,
            past_key_values=cache,
            position_ids=torch.arange(tokens.shape[1])[None],
            mm_token_type_ids=tokens.eq(self.config.image_token_id or 0).long(),
        )
        return {"attention_mask": masks, **images([p.picture for p in prompt.pictures])}


def build(values: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """Its network in float32, from a config.json and tensors by their stored names."""
    values = dict(values)
    if not values.get("vision_config"):
        # Nor can it generate without an image token.
        values |= {"vision_config": TOWER, "image_token_id": values["text_config"]["vocab_size"]}
    model = transformers.DiffusionGemmaForBlockDiffusion(transformers.DiffusionGemmaConfig.from_dict(values))
    model.set_experts_implementation("eager")
    found = model.float().load_state_dict(weights, strict=False)
    if found.unexpected_keys:
        raise ValueError(f"transformers does not know {found.unexpected_keys[0]}")
    stack = model.model.encoder.language_model
    shared = {p.data_ptr() for p in model.model.decoder.parameters()}
    if not all(p.data_ptr() in shared for p in (*stack.parameters(), model.lm_head.weight)):
        raise ValueError("transformers does not tie its two stacks")
    return model.eval()


def images(shown: Sequence[Picture], patches: int = 0) -> dict[str, Tensor]:
    """What it takes: pixels in 0 … 1 and positions, padded to at least so many patches."""
    patches = max(patches, *(len(each.patches) for each in shown))
    pixels = torch.zeros(len(shown), patches, shown[0].patches.shape[1])
    places = torch.full((len(shown), patches, 2), -1)
    for i, each in enumerate(shown):
        count = len(each.patches)
        pixels[i, :count] = torch.from_numpy(each.patches) / 255
        y, x = np.divmod(np.arange(count), each.columns)
        places[i, :count] = torch.from_numpy(np.stack((x, y), -1))
    return {"pixel_values": pixels, "image_position_ids": places}


@torch.no_grad()
def generate(
    theirs: Any, prompts: Tensor, options: GenerationConfig, noise: Sequence[Noise], **given: Tensor
) -> tuple[list[list[Block]], Any]:
    """Its `generate` with prompts [B, T], what else is given, and these draws: each row's blocks, and its own output.

    It runs rows in lockstep: a row that has settled waits, and its later steps and blocks are not its own.
    """
    rows: list[list[list[tuple[Tensor, Tensor, Tensor]]]] = [[] for _ in noise]
    converged: list[list[bool]] = [[] for _ in noise]
    open_rows = [True] * len(noise)
    at = {"block": -1, "step": 0}
    prepare, step = type(theirs)._prepare_denoiser_inputs, type(theirs)._denoising_step

    def next_block(self: Any, **kwargs: Any) -> Any:
        at["block"], at["step"] = at["block"] + 1, 0
        for i, row in enumerate(rows):
            ended = bool(row) and any(token in options.eos_token_id for token in row[-1][-1][0].tolist())
            open_rows[i] = open_rows[i] and not ended
            if open_rows[i]:
                row.append([])
                converged[i].append(False)
        return prepare(self, **kwargs)

    def next_step(self: Any, **kwargs: Any) -> Any:
        at["step"] += 1
        waiting = kwargs["finished_denoising"].clone()
        canvas, best, logits, finished = step(self, **kwargs)
        entropy = torch.distributions.Categorical(logits=logits.float()).entropy()
        for i, row in enumerate(rows):
            if open_rows[i] and not waiting[i]:
                row[-1].append((best[i].clone(), canvas[i].clone(), entropy[i]))
                converged[i][-1] = bool(finished[i])
        return canvas, best, logits, finished

    def fresh(self: Any, batch_size: int, device: torch.device) -> Tensor:
        block, n = at["block"], at["step"]
        return torch.stack([x.renoise(block, n) if n else x.canvas(block) for x in noise]).to(device)

    def draw(probabilities: Tensor, num_samples: int) -> Tensor:
        uniform = torch.cat([x.uniform(at["block"], at["step"]) for x in noise]).to(probabilities.device)
        above = probabilities.double().cumsum(-1) > uniform[:, None]
        return above.int().argmax(-1, keepdim=True)

    config = generation.DiffusionGemmaGenerationConfig(
        max_new_tokens=options.max_new_tokens,
        max_denoising_steps=options.max_denoising_steps,
        sampler_config=generation.EntropyBoundSamplerConfig(entropy_bound=options.entropy_bound),
        t_min=options.t_min,
        t_max=options.t_max,
        stability_threshold=options.stability_threshold,
        confidence_threshold=options.confidence_threshold,
        eos_token_id=list(options.eos_token_id),
        pad_token_id=options.pad_token_id,
    )
    with (
        mock.patch.object(type(theirs), "_prepare_denoiser_inputs", next_block),
        mock.patch.object(type(theirs), "_denoising_step", next_step),
        mock.patch.object(generation.EntropyBoundSampler, "initialize_canvas", fresh),
        mock.patch.object(torch, "multinomial", draw),
    ):
        out = theirs.generate(prompts, generation_config=config, **given)
    blocks = []
    for row, own in zip(rows, converged, strict=True):
        columns = ([torch.stack(column).cpu().numpy() for column in zip(*steps, strict=True)] for steps in row)
        blocks.append(
            [Block(best, canvas, entropy, still) for (best, canvas, entropy), still in zip(columns, own, strict=True)]
        )
    return blocks, out
