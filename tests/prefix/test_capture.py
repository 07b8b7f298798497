"""Record and replay attention on a real diffusers transformer with small random weights."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from imagewam_cli.errors import CaptureError
from imagewam_cli.prefix.capture import attention_layers, exclusive, record, replay

NAMES = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]
TEXT, IMAGE = 5, 6


@pytest.fixture(scope="module")
def transformer() -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()


def inputs(batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(IMAGE, 4)
    ids[:, 1] = torch.arange(IMAGE)
    text = torch.zeros(TEXT, 4)
    text[:, 3] = torch.arange(TEXT)
    return {
        "hidden_states": torch.randn(batch, IMAGE, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, 12, generator=generator),
        "timestep": torch.full((batch,), 0.3),
        "img_ids": ids,
        "txt_ids": text,
    }


def test_layers_are_found_in_order_with_their_heads(transformer: Flux2Transformer2DModel) -> None:
    assert attention_layers(transformer, **inputs()) == dict.fromkeys(NAMES, (2, 16))


def test_recorded_values_equal_the_models_projections(transformer: Flux2Transformer2DModel) -> None:
    """V of a double block is [text | image] after the block's own value projections, read here with plain hooks."""
    seen: dict[str, Tensor] = {}
    attention = transformer.transformer_blocks[0].attn
    hooks = [
        attention.to_v.register_forward_hook(lambda _m, _a, out: seen.update(image=out)),
        attention.add_v_proj.register_forward_hook(lambda _m, _a, out: seen.update(text=out)),
    ]
    try:
        with torch.no_grad(), record(transformer, NAMES) as recording:
            transformer(**inputs())
    finally:
        for hook in hooks:
            hook.remove()
    expected = torch.cat([seen["text"], seen["image"]], dim=1).unflatten(-1, (2, 16))
    assert torch.equal(recording.layers[NAMES[0]].v, expected)


def test_recorded_keys_are_normalised_and_rotated(transformer: Flux2Transformer2DModel) -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    seen: dict[str, Tensor] = {}
    attention = transformer.transformer_blocks[0].attn
    hooks = [
        attention.norm_k.register_forward_hook(lambda _m, _a, out: seen.update(image=out)),
        attention.norm_added_k.register_forward_hook(lambda _m, _a, out: seen.update(text=out)),
    ]
    values = inputs()
    try:
        with torch.no_grad(), record(transformer, NAMES) as recording:
            transformer(**values)
    finally:
        for hook in hooks:
            hook.remove()
    tables = [transformer.pos_embed(values[name]) for name in ("txt_ids", "img_ids")]
    rope = tuple(torch.cat([tables[0][i], tables[1][i]]) for i in (0, 1))
    expected = apply_rotary_emb(torch.cat([seen["text"], seen["image"]], dim=1), rope, sequence_dim=1)
    torch.testing.assert_close(recording.layers[NAMES[0]].k, expected, atol=0, rtol=0)


def test_recording_changes_no_output_and_leaves_no_hook(transformer: Flux2Transformer2DModel) -> None:
    with torch.no_grad():
        before = transformer(**inputs(), return_dict=False)[0]
        with record(transformer, NAMES):
            during = transformer(**inputs(), return_dict=False)[0]
    assert torch.equal(before, during)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in transformer.modules())


def test_stopping_after_the_last_layer_records_the_same(transformer: Flux2Transformer2DModel) -> None:
    reached = []
    hook = transformer.proj_out.register_forward_hook(lambda *_: reached.append(True))
    try:
        with torch.no_grad(), record(transformer, NAMES) as whole:
            transformer(**inputs())
        assert reached == [True]
        with torch.no_grad(), record(transformer, NAMES, stop_after_last=True) as stopped:
            transformer(**inputs())
        assert reached == [True]
    finally:
        hook.remove()
    for name in NAMES:
        assert torch.equal(whole.layers[name].k, stopped.layers[name].k)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in transformer.modules())


@pytest.mark.parametrize("padded", [False, True])
def test_replay_equals_one_forward_with_the_published_mask(transformer: Flux2Transformer2DModel, padded: bool) -> None:
    """Target tokens that attend to a recorded [text | reference] prefix equal one forward over all tokens.

    The mask of that forward hides the target from the prefix, and padded text from every token.
    """
    values = inputs()
    batch, target = 2, 4
    noisy = torch.randn(batch, target, 8, generator=torch.Generator().manual_seed(9))
    target_ids = torch.zeros(target, 4)
    target_ids[:, 2] = torch.arange(target)
    valid = torch.ones(batch, TEXT + IMAGE, dtype=torch.bool)
    if padded:
        valid[1, 3:TEXT] = False

    total = TEXT + IMAGE + target
    mask = torch.ones(batch, 1, total, total, dtype=torch.bool)
    mask[:, :, : TEXT + IMAGE, TEXT + IMAGE :] = False
    mask[:, :, :, : TEXT + IMAGE] &= valid[:, None, None, :]
    joint = dict(values)
    joint["hidden_states"] = torch.cat([values["hidden_states"], noisy], dim=1)
    joint["img_ids"] = torch.cat([values["img_ids"], target_ids])

    with torch.no_grad():
        expected = transformer(**joint, joint_attention_kwargs={"attention_mask": mask}, return_dict=False)[0][
            :, IMAGE:
        ]
        with record(transformer, NAMES) as recording:
            transformer(**values, joint_attention_kwargs={"attention_mask": valid[:, None, None, :]})
        alone = dict(values)
        alone |= {
            "hidden_states": noisy,
            "img_ids": target_ids,
            "encoder_hidden_states": torch.zeros(batch, 0, 12),
            "txt_ids": torch.zeros(0, 4),
        }
        with replay(transformer, recording.layers, valid if padded else None):
            got = transformer(**alone, return_dict=False)[0]
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


def test_gradients_reach_the_prefix(transformer: Flux2Transformer2DModel) -> None:
    values = inputs()
    values["encoder_hidden_states"].requires_grad_(True)
    with record(transformer, NAMES) as recording:
        transformer(**values)
    alone = inputs(seed=3) | {"encoder_hidden_states": torch.zeros(2, 0, 12), "txt_ids": torch.zeros(0, 4)}
    with replay(transformer, recording.layers):
        transformer(**alone, return_dict=False)[0].square().sum().backward()
    gradient = values["encoder_hidden_states"].grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    transformer.zero_grad()


def test_unknown_module_is_named(transformer: Flux2Transformer2DModel) -> None:
    with (
        pytest.raises(CaptureError, match=r"no module transformer_blocks\.9\.attn"),
        record(transformer, ["transformer_blocks.9.attn"]),
    ):
        pass


def test_layer_that_never_attends_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(CaptureError, match="no attention call was intercepted in 0"), record(model, ["0"]):
        model(torch.zeros(1, 3))


def test_an_attention_backend_that_cannot_be_recorded_is_an_error(
    transformer: Flux2Transformer2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capture sees only torch's attention function, so a backend that does not call it must not go unnoticed."""
    from diffusers.models.transformers import transformer_flux2

    def other(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        weights = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1)).softmax(-1)
        return (weights @ value.transpose(1, 2)).transpose(1, 2)

    monkeypatch.setattr(transformer_flux2, "dispatch_attention_fn", other)
    with pytest.raises(CaptureError) as caught, torch.no_grad(), record(transformer, NAMES):
        transformer(**inputs())
    assert "native" in str(caught.value.hint)


class _Causal(nn.Module):
    """Attention that passes `is_causal` as a positional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.forward = lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.0, True)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x)
        return out


def test_positional_arguments_of_attention_are_kept() -> None:
    x = torch.randn(1, 2, 5, 8)
    model = _Causal()
    with record(model, ["attention"]):
        recorded = model(x)
    assert torch.equal(recorded, F.scaled_dot_product_attention(x, x, x, is_causal=True))
    assert not torch.allclose(recorded, F.scaled_dot_product_attention(x, x, x))


@pytest.mark.parametrize("early", [False, True])
def test_a_dropped_recording_is_freed_at_once(transformer: Flux2Transformer2DModel, early: bool) -> None:
    """Tensors must not wait for the garbage collector: K and V of a few forwards can fill a GPU."""

    def recorded() -> list[weakref.ref[Tensor]]:
        names = list(attention_layers(transformer, **inputs()))
        with torch.no_grad(), record(transformer, names, stop_after_last=early) as recording:
            transformer(**inputs())
        return [weakref.ref(x) for kv in recording.layers.values() for x in (kv.k, kv.v)]

    recorded()  # the first recording of a process imports a part of torch that keeps frames alive
    gc.disable()
    try:
        assert not any(tensor() is not None for tensor in recorded())
    finally:
        gc.enable()


def test_threads_record_one_model_as_one_thread_does(transformer: Flux2Transformer2DModel) -> None:
    def recorded(seed: int) -> Tensor:
        with torch.no_grad(), record(transformer, NAMES, stop_after_last=True) as recording:
            transformer(**inputs(seed=seed))
        return torch.cat([recording.layers[name].k for name in NAMES], dim=1)

    expected = [recorded(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(recorded, range(8)), expected, strict=True):
            assert torch.equal(got, wanted)


def test_a_forward_pass_of_another_thread_is_not_recorded(transformer: Flux2Transformer2DModel) -> None:
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        with record(transformer, NAMES) as alone:
            expected = transformer(**inputs(), return_dict=False)[0]

        def elsewhere() -> Tensor:
            with torch.no_grad():
                out: Tensor = transformer(**inputs(), return_dict=False)[0]
            return out

        with record(transformer, NAMES) as recording:
            assert torch.equal(pool.submit(elsewhere).result(), expected)
            transformer(**inputs(seed=5))
    assert set(recording.layers) == set(NAMES)
    assert not torch.equal(recording.layers[NAMES[0]].k, alone.layers[NAMES[0]].k)


def test_one_model_is_exclusive_and_two_models_are_not() -> None:
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    entered: list[str] = []

    def enter(model: nn.Module, name: str) -> None:
        with exclusive(model):
            entered.append(name)

    with exclusive(one), exclusive(one):
        threads = [threading.Thread(target=enter, args=item) for item in ((one, "same"), (two, "other"))]
        for thread in threads:
            thread.start()
        threads[1].join(60)
        assert entered == ["other"]
    threads[0].join(60)
    assert entered == ["other", "same"]


def test_a_model_can_still_be_copied_and_pickled() -> None:
    model = nn.Linear(1, 1)
    with exclusive(model):
        copy.deepcopy(model)
        pickle.loads(pickle.dumps(model))


def test_a_forked_process_does_not_wait_for_threads_that_it_lacks() -> None:
    model, held, done = nn.Linear(1, 1), threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(model):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = os.fork()
    if child == 0:
        with exclusive(model):
            os._exit(7)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
