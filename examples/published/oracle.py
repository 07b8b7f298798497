"""Compare imagewam with numbers that the published ImageWAM code (FLUX.2 stack) computed on tiny random weights.

    python examples/published/oracle.py --oracle DIR [--model model.pt]

DIR holds config.json, index.json, the weights and one safetensors file per case. The script prints, for every case, the
maximum absolute error of each quantity (gradients: relative to each tensor's maximum). The column "1 % off" shows what
a real error looks like: the error of the case's last quantity (action, picture or gradient) after the value projection
of the editor's first layer is scaled by 1.01. With --model, the parts come from a policy folder that `imagewam import`
makes from the checkpoint, instead of directly from the weights.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from imagewam_cli.editors.contract import TextToken, TokenPlacement
from imagewam_cli.editors.text import Text, with_token
from imagewam_cli.expert.flow import FlowSchedule
from imagewam_cli.expert.model import ActionExpert, ExpertConfig, to_bfloat16
from imagewam_cli.expert.sampler import integrate
from imagewam_cli.policy.bundle import ProprioConfig
from imagewam_cli.policy.policy import Policy
from imagewam_cli.policy.proprio import ProprioEncoder
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.prefix.spec import BlockKind, LayerSpec, RopeSpec, RoundingName, SegmentSpec
from imagewam_cli.published.importing import import_policy
from imagewam_cli.published.robots import ROBOTS, Robot
from imagewam_cli.published.settings import TrainSettings
from imagewam_flux2.editor import Flux2Editor
from imagewam_flux2.joint import JointBatch, joint_step
from imagewam_flux2.release import Flux2Release
from imagewam_flux2.tokens import ACTION_T, REFERENCE_T, FluxPrefix, FluxTokens, RoundedPositions, image_ids
from imagewam_tiny import architecture

TOLERANCE = 5e-5
VIDEO, ACTION, PROPRIO = "mixtures.video.transformer.", "mixtures.action.", "proprio_encoder."

Case = dict[str, Tensor]
Errors = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class System:
    """The models that the cases run on. names: layer names in the cases' files, in execution order."""

    tokens: FluxTokens
    expert: dict[str, Any]
    """Fields of `ExpertConfig` except the horizon, which differs between cases."""
    weights: dict[str, Tensor]
    proprio: dict[str, Tensor]
    names: tuple[str, ...]
    rounding: RoundingName

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.rounding == "exact" else torch.bfloat16

    def action_expert(self, horizon: int) -> ActionExpert:
        expert = ActionExpert(ExpertConfig(**self.expert, horizon=horizon))
        expert.load_state_dict(self.weights)
        return expert

    def text(self, embeds: Tensor, valid: Tensor, state: Tensor | None, *, packed: bool) -> Text:
        """Return the case's text states, with the state token if the case has one."""
        text = Text(embeds=embeds.to(self.dtype), valid=valid)
        if state is None:
            return text
        width, state_dim = self.proprio["weight"].shape
        placement = "packed" if packed else "appended"
        config = ProprioConfig(state_dim=state_dim, text_width=width, placement=placement, text_tokens=valid.shape[1])
        encoder = ProprioEncoder(config)
        encoder.load_state_dict(self.proprio)
        return with_token(text, encoder.to(self.dtype).token(state))

    def prefix(self, text: Text, reference: Tensor, grid: tuple[int, int]) -> FluxPrefix:
        return self.tokens.prefix(text, reference, image_ids(*grid, t=REFERENCE_T), timestep=0.0)


def direct(folder: Path, rounding: RoundingName) -> System:
    """Build the system directly from the oracle's weights, without a policy folder."""
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "weights.safetensors")
    transformer = Flux2Transformer2DModel.from_config(_config(folder / "diffusers_transformer_config.json"))
    transformer.load_state_dict(Flux2Release().from_release(_named(weights, VIDEO)))
    vae = AutoencoderKLFlux2.from_config(_config(folder / "diffusers_vae_config.json"))
    vae.load_state_dict(load_file(folder / "diffusers_vae.safetensors"))
    rope = RopeSpec(
        axes=tuple(config["axes_dim"]), theta=float(config["theta"]), action_axis=1, action_ids=(ACTION_T, 0, 0, 0)
    )
    if rounding == "published-bf16":
        to_bfloat16(transformer)
        vae.to(torch.bfloat16)
        transformer.pos_embed = RoundedPositions(dataclasses.replace(rope, rounding=rounding))
    return System(
        tokens=FluxTokens(transformer=transformer.eval(), vae=vae.eval(), text_encoder=None, tokenizer=None),
        expert={
            "layers": tuple(_layer(config, name) for name in _names(config)),
            "rope": rope,
            "action_dim": config["action_dim"],
            "state_dim": 0,
            "hidden": config["action_hidden"],
            "mlp_ratio": config["action_mlp_ratio"],
            "rounding": rounding,
        },
        weights=_named(weights, ACTION),
        proprio=_named(weights, PROPRIO),
        names=_names(config),
        rounding=rounding,
    )


def imported(folder: Path, model: Path, rounding: RoundingName) -> System:
    """Build the system from a policy folder that `imagewam import` makes from a checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    robot = _robot(config["proprio_dim"], config["action_dim"])
    with tempfile.TemporaryDirectory() as scratch:
        base, policy = Path(scratch) / "base", Path(scratch) / "policy"
        _write_pipeline(folder, base, text_width=config["context_in_dim"])
        statistics = {
            field: {"default": _made_up(len(names))}
            for field, names in (("state", robot.state_names), ("action", robot.action_names))
        }
        (base / "dataset_stats.json").write_text(json.dumps(statistics), encoding="utf-8")
        import_policy(
            model,
            base / "dataset_stats.json",
            policy,
            editor="tiny",
            robot=robot,
            train=TrainSettings(),
            rounding=rounding,
            weights=base,
        )
        loaded = Policy.load(policy, weights=base)
    editor, proprio = loaded.editor, loaded.proprio
    assert isinstance(editor, Flux2Editor)
    assert proprio is not None
    fields = {f.name: getattr(loaded.expert.config, f.name) for f in dataclasses.fields(ExpertConfig)}
    del fields["horizon"]
    return System(
        tokens=editor.tokens,
        expert=fields,
        weights=loaded.expert.state_dict(),
        proprio=proprio.state_dict(),
        names=_names(config),
        rounding=rounding,
    )


def _robot(state_dim: int, action_dim: int) -> Robot:
    """Return a robot with these numbers of dimensions; a state may have more of them than an action, or fewer."""
    return dataclasses.replace(
        ROBOTS["robotwin"],
        state_names=tuple(f"joint_{i}" for i in range(state_dim)),
        action_names=tuple(f"joint_{i}" for i in range(action_dim)),
        image_size=(96, 64),
    )


def _write_pipeline(folder: Path, base: Path, *, text_width: int) -> None:
    """Write a pipeline folder with the oracle's editor and VAE.

    The cases include their text states, so the text encoder must exist but is not used.
    """
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = architecture.build_tokenizer()
    hidden = text_width // len(architecture.TEXT_LAYERS)
    text = architecture.TEXT_CONFIG | {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    Flux2Transformer2DModel.from_config(_config(folder / "diffusers_transformer_config.json")).save_pretrained(
        base / "transformer"
    )
    vae = AutoencoderKLFlux2.from_config(_config(folder / "diffusers_vae_config.json"))
    vae.load_state_dict(load_file(folder / "diffusers_vae.safetensors"))
    vae.save_pretrained(base / "vae")
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **text)).save_pretrained(base / "text_encoder")
    tokenizer.save_pretrained(base / "tokenizer")


def _made_up(dim: int) -> dict[str, list[float]]:
    return {f"global_{name}": [value] * dim for name, value in (("min", -1.0), ("max", 1.0), ("mean", 0.0))} | {
        f"global_{name}": [1.0] * dim for name in ("std", "q01", "q99")
    }


def infer(system: System, case: Case, spec: dict[str, Any]) -> Errors:
    """Compare every step from the picture to the action."""
    grid = _grid(case["in.image"])
    dtype = system.dtype
    with torch.no_grad():
        state = case["in.proprio"] if spec["proprio"] else None
        text = system.text(case["in.context"], case["in.context_mask"], state, packed=spec["pack"])
        reference = system.tokens.image(case["in.image"].to(dtype))
        recorded = system.prefix(text, reference, grid)
        prefix = PrefixKV(tuple(recorded.layers.values()), recorded.valid)
        layers = system.prefix(
            text, case["ref.tokens"], grid
        ).layers.values()  # without the rounding of the picture's tokens
        schedule = FlowSchedule(shift=spec.get("sigma_shift", 5.0))
        levels = schedule.grid(spec["steps"])
        expert = system.action_expert(case["noise.initial"].shape[1])
        noise = torch.randn(
            case["noise.initial"].shape, generator=torch.Generator().manual_seed(spec["noise_seed"])
        ).to(dtype)
        steps = zip(case["step.x"], case["step.t_unit"], case["step.velocity"], strict=True)
        return {
            "tokens": _error(reference, case["ref.tokens"]),
            "text": _error(text.embeds, case["txt.context_after_proprio"]),
            "mask": _error(recorded.valid[:, None, :].expand_as(case["mask.prefill"]), case["mask.prefill"]),
            "kv": max(
                _error(getattr(kv, part).flatten(2), case[f"cache.{name}.{part}"])
                for name, kv in zip(system.names, layers, strict=True)
                for part in "kv"
            ),
            "schedule": max(
                _error((1000 * levels[:-1]).to(dtype) / 1000, case["step.t_unit"][:, 0]),
                _error((levels[1:] - levels[:-1]).to(dtype), case["sched.deltas"]),
                _error(noise, case["noise.initial"]),
            ),
            "velocity": max(_error(expert(x, t, None, prefix), velocity) for x, t, velocity in steps),
            "action": _error(integrate(expert, noise, None, prefix, schedule, spec["steps"])[0], case["out.action"]),
        }


def train(system: System, case: Case, spec: dict[str, Any]) -> Errors:
    """Compare losses, predictions and all gradients of the joint step; gradients relative to each tensor's maximum."""
    tokens, expert = system.tokens, system.action_expert(case["in.action"].shape[1])
    weight, bias = (system.proprio[name].clone().requires_grad_() for name in ("weight", "bias"))
    tokens.transformer.requires_grad_(True).zero_grad()
    expert.requires_grad_(True)
    batch_size = len(case["in.action"])
    text = Text(embeds=case["in.text_hidden_states"], valid=case["in.text_attention_mask"])
    if spec["proprio"]:
        placement: TokenPlacement = "packed" if spec["pack"] else "appended"
        vectors = torch.nn.functional.linear(case["in.proprio"][:, 0], weight, bias)
        text = with_token(text, TextToken(vectors=vectors, placement=placement, text_tokens=text.valid.shape[1]))
    nothing = torch.zeros(batch_size, case["in.action"].shape[1], dtype=torch.bool)
    batch = JointBatch(
        text=text,
        reference=tokens.image(case["in.video"][:, :, 0]),
        target=tokens.image(case["in.video"][:, :, -1]),
        grid=_grid(case["in.video"]),
        actions=case["in.action"],
        is_pad=case.get("in.action_is_pad", nothing),
        dim_is_pad=case.get("in.action_dim_is_pad"),
        video_noise=case["noise.video"],
        action_noise=case["noise.action"],
        video_t=case["t.video"] / 1000,
        action_t=case["t.action"] / 1000,
    )
    step = joint_step(tokens, expert, batch, FlowSchedule())
    step.loss.backward()
    gradients = {f"{ACTION}{name}": p.grad for name, p in expert.named_parameters()}
    editor = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in tokens.transformer.named_parameters()}
    gradients |= {f"{VIDEO}{name}": value for name, value in Flux2Release().to_release(editor).items()}
    gradients |= {f"{PROPRIO}weight": weight.grad, f"{PROPRIO}bias": bias.grad}
    parameters = {f"{ACTION}{name}": p for name, p in expert.named_parameters()}
    released = Flux2Release().to_release(dict(tokens.transformer.named_parameters()))
    parameters |= {f"{VIDEO}{name}": value for name, value in released.items()}
    parameters |= {f"{PROPRIO}weight": weight, f"{PROPRIO}bias": bias}
    theirs = {name.removeprefix("grad."): value for name, value in case.items() if name.startswith("grad.")}
    assert theirs.keys() <= gradients.keys(), sorted(theirs.keys() - gradients.keys())
    relative = {
        name: _error(gradients[name], value) / max(value.abs().max().item(), 1e-12) for name, value in theirs.items()
    }
    return {
        "tokens": max(_error(batch.reference, case["ref.tokens"]), _error(batch.target, case["target.tokens"])),
        "velocity": max(
            _error(step.video_velocity, case["pred.video"]), _error(step.action_velocity, case["pred.action"])
        ),
        "loss": max(
            _error(step.video_loss, case["loss.video"]),
            _error(step.action_loss, case["loss.action"]),
            _error(step.loss, case["loss.total"]),
        ),
        "gradient": max(relative.values()),
        "step": _step_error([(name, parameters[name], gradients[name]) for name in gradients], case),
    }


def _step_error(named: list[tuple[str, Tensor, Tensor]], case: Case) -> float:
    """Return the error of the weights after one AdamW step with the published hyperparameters, if the case has them."""
    parameters = [parameter.detach().clone().requires_grad_() for _, parameter, _ in named]
    for parameter, (_, _, gradient) in zip(parameters, named, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-2).step()
    after = {name: parameter for (name, _, _), parameter in zip(named, parameters, strict=True)}
    return max(_error(after[k.removeprefix("after_step.")], v) for k, v in case.items() if k.startswith("after_step."))


def video(system: System, case: Case, spec: dict[str, Any]) -> Errors:
    """Compare the future picture, denoised by the editor without the expert."""
    grid = _grid(case["in.image"])
    tokens, ids = system.tokens, image_ids(*grid, t=REFERENCE_T)
    state = case["in.proprio"] if spec["proprio"] else None
    with torch.no_grad():
        text = system.text(case["in.context"], case["in.context_mask"], state, packed=spec["pack"])
        reference = tokens.image(case["in.image"])

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return tokens.target_velocity(tokens.prefix(text, reference, ids, timestep=t), x, t, grid)

        steps = zip(case["step.x"], case["step.t_unit"], case["step.velocity"], strict=True)
        errors = [_error(velocity(x, t), expected) for x, t, expected in steps]
        levels = FlowSchedule().grid(spec["steps"])
        x = case["noise.initial"]
        for t, after in itertools.pairwise(levels):
            x = x + (after - t) * velocity(x, t.expand(len(x)))
        return {
            "tokens": _error(reference, case["ref.tokens"]),
            "velocity": max(errors),
            "picture": _error(tokens.picture(x, *grid)[0], case["out.image"]),
        }


def table(rows: list[tuple[str, Errors]]) -> str:
    """Format the errors as text: a line per case, a column per quantity."""
    columns = list(dict.fromkeys(quantity for _, errors in rows for quantity in errors))
    lines = [["case", *columns]]
    lines += [[name, *(f"{e[c]:.1e}" if c in e else "" for c in columns)] for name, e in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def perturbed(system: System) -> System:
    """Return the system with one weight tensor scaled by 1.01."""
    transformer = copy.deepcopy(system.tokens.transformer)
    with torch.no_grad():
        transformer.transformer_blocks[0].attn.to_v.weight.mul_(1.01)
    tokens = FluxTokens(transformer=transformer, vae=system.tokens.vae, text_encoder=None, tokenizer=None)
    return System(**{**vars(system), "tokens": tokens})


def cases(folder: Path, kind: str) -> list[tuple[str, Case, dict[str, Any]]]:
    """Return (name, tensors, parameters) of the available cases of one kind."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))[kind]
    pattern = "infer_{}_bf16" if kind == "bf16" else f"{kind}_{{}}"
    paths = {name: folder / f"{pattern.format(name)}.safetensors" for name in index}
    return [(path.stem, load_file(path), index[name]) for name, path in paths.items() if path.exists()]


def run(folder: Path, model: Path | None) -> list[tuple[str, Errors]]:
    """Run every case in the folder. model: the checkpoint to import; None: use the weights directly."""
    rows = []
    kinds: tuple[tuple[str, RoundingName], ...] = (("infer", "exact"), ("bf16", "published-bf16"))
    for kind, rounding in kinds:
        system = direct(folder, rounding) if model is None else imported(folder, model, rounding)
        other = perturbed(system)
        for name, case, spec in cases(folder, kind):
            errors = infer(system, case, spec)
            rows.append((name, errors | {"1 % off": infer(other, case, spec)["action"]}))
        if kind == "infer":
            for measure, last in ((video, "picture"), (train, "gradient")):
                for name, case, spec in cases(folder, measure.__name__):
                    errors = measure(system, case, spec)
                    rows.append((name, errors | {"1 % off": measure(other, case, spec)[last]}))
    return rows


def _error(mine: Tensor, theirs: Tensor) -> float:
    return (mine.float() - theirs.float()).abs().max().item()


def _grid(pictures: Tensor) -> tuple[int, int]:
    height, width = pictures.shape[-2:]
    return height // 16, width // 16


def _config(path: Path) -> dict[str, Any]:
    return {
        key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if not key.startswith("_")
    }


def _named(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _names(config: dict[str, Any]) -> tuple[str, ...]:
    doubles = (f"double.{i}" for i in range(config["depth"]))
    return (*doubles, *(f"single.{i}" for i in range(config["depth_single"])))


def _layer(config: dict[str, Any], name: str) -> LayerSpec:
    block: BlockKind = "sequential" if name.startswith("double") else "parallel"
    heads = config["num_heads"]
    text = SegmentSpec(name="text", tokens=1)
    return LayerSpec(name=name, block=block, heads=heads, kv_heads=heads, head_dim=config["head_dim"], segments=(text,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", type=Path, required=True, help="folder of the cases")
    parser.add_argument("--model", type=Path, help="a checkpoint to import, instead of using the folder's weights")
    arguments = parser.parse_args()
    print(table(run(arguments.oracle, arguments.model)))


if __name__ == "__main__":
    main()
