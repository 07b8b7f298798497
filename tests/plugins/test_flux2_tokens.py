"""Compare FLUX.2's inputs with diffusers' own pipeline: picture tokens, position ids and text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline

from imagewam_flux2.tokens import REFERENCE_T, TARGET_T, FluxTokens, image_ids, text_ids
from imagewam_tiny import architecture

INSTRUCTIONS = ["put the red square on the yellow zone", "move the blue one above the orange triangle"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipe = architecture.build_pipeline(seed=3)
    generator = torch.Generator().manual_seed(0)
    pipe.vae.bn.running_mean.copy_(torch.randn(32, generator=generator))
    pipe.vae.bn.running_var.copy_(torch.rand(32, generator=generator) + 0.5)
    return pipe


@pytest.fixture(scope="module")
def tokens(pipeline: Any) -> FluxTokens:
    return FluxTokens.from_pipeline(pipeline, text_layers=architecture.TEXT_LAYERS, max_text_tokens=24)


def test_picture_tokens_and_ids_equal_the_pipelines(pipeline: Any, tokens: FluxTokens) -> None:
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected, ids = pipeline.prepare_image_latents([picture], 1, None, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(tokens.image(picture), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(image_ids(4, 6, t=REFERENCE_T), ids[0].float())


def test_target_ids_equal_the_pipelines() -> None:
    expected = Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 32, 4, 6))
    assert torch.equal(image_ids(4, 6, t=TARGET_T), expected[0].float())


def test_text_ids_equal_the_pipelines() -> None:
    expected = Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, 7, 3))
    assert torch.equal(text_ids(7), expected[0].float())


def test_text_equals_the_pipelines_on_valid_tokens(pipeline: Any, tokens: FluxTokens) -> None:
    expected = pipeline._get_qwen3_prompt_embeds(
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        prompt=INSTRUCTIONS,
        max_sequence_length=24,
        hidden_states_layers=list(architecture.TEXT_LAYERS),
    )
    text = tokens.text(INSTRUCTIONS, pad_to=24)
    assert text.valid.sum(1).tolist() == [len(tokens.token_ids(i)) for i in INSTRUCTIONS]
    torch.testing.assert_close(text.embeds, expected, atol=1e-5, rtol=1e-5)


def test_padding_changes_no_valid_token(tokens: FluxTokens) -> None:
    short, long = tokens.text(INSTRUCTIONS[:1]), tokens.text(INSTRUCTIONS[:1], pad_to=24)
    length = short.valid.shape[1]
    torch.testing.assert_close(long.embeds[:, :length], short.embeds, atol=1e-5, rtol=1e-5)


def test_picture_inverts_image_except_for_the_losses_of_the_vae(pipeline: Any, tokens: FluxTokens) -> None:
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        mean = pipeline.vae.encode(picture).latent_dist.mode()
        expected = pipeline.vae.decode(mean).sample.clamp(-1, 1)
    torch.testing.assert_close(tokens.picture(tokens.image(picture), 2, 2), expected, atol=1e-5, rtol=1e-5)


def test_long_instruction_is_cut_at_the_limit(tokens: FluxTokens) -> None:
    assert len(tokens.token_ids("put the red block on the blue zone " * 20)) == 24


def test_tokenizer_covers_any_text(pipeline: Any) -> None:
    text = "Ünïcode: 日本語 and a tab\t!"
    ids = pipeline.tokenizer(text)["input_ids"]
    assert pipeline.tokenizer.decode(ids) == text
    assert np.max(ids) < architecture.VOCABULARY
