# SPDX-License-Identifier: Apache-2.0
"""Train the text-to-music diffusion transformer and its text encoder together.

v-prediction on the cosine schedule: x_t = sqrt(a_t) x + sqrt(1 - a_t) e, target
v = sqrt(a_t) e - sqrt(1 - a_t) x (Salimans and Ho 2022, arXiv:2202.00512), captions re-worded in
every epoch, 10 % of them dropped (zero context) for classifier-free guidance.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableAudioDiTModel
from torch import Tensor, nn
from tqdm import tqdm

from ...io.atomic import replacing, write_text
from ...io.tensors import write_safetensors
from ..music.captions import caption
from ..music.codec import LinearMelCodec
from ..music.pipeline import rotary_embedding
from ..music.text import MAX_TOKENS, TEXT_WIDTH, build_text_encoder, build_tokenizer

TRAIN_TIMESTEPS = 1000
GLOBAL_WIDTH = 64  # width of the (always zero) global condition; text acts by cross-attention only


@dataclass(frozen=True)
class MusicRecipe:
    """Sizes and schedule of one training; the defaults are those of the committed model."""

    layers: int = 8
    heads: int = 5
    head_width: int = 32
    batch: int = 32
    steps: int = 2500
    warmup: int = 150
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.01
    drop_text: float = 0.1
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    save_minutes: float = 3.0


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Build the scheduler of the pipeline; training uses its noise schedule too."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="trailing",
        lower_order_final=True,
    )


def build_transformer(recipe: MusicRecipe) -> StableAudioDiTModel:
    """Build an untrained denoiser of the size in the recipe."""
    width = recipe.heads * recipe.head_width
    return StableAudioDiTModel(
        sample_size=64,
        in_channels=64,
        out_channels=64,
        num_layers=recipe.layers,
        attention_head_dim=recipe.head_width,
        num_attention_heads=recipe.heads,
        num_key_value_attention_heads=recipe.heads,
        cross_attention_dim=width,
        time_proj_dim=64,
        global_states_input_dim=GLOBAL_WIDTH,
        cross_attention_input_dim=TEXT_WIDTH,
    )


def learning_rate(recipe: MusicRecipe, step: int) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))


class _Model(nn.Module):
    def __init__(self, recipe: MusicRecipe, vocabulary: int) -> None:
        super().__init__()
        self.transformer = build_transformer(recipe)
        self.text_encoder = build_text_encoder(vocabulary)
        self.rotary = rotary_embedding(self.transformer)

    def forward(self, latents: Tensor, times: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        mask = (ids != 0).long()
        context = self.text_encoder(input_ids=ids, attention_mask=mask)[0]
        context = context * (mask * keep[:, None])[..., None]
        velocity: Tensor = self.transformer(
            latents,
            times / TRAIN_TIMESTEPS,
            encoder_hidden_states=context,
            global_hidden_states=latents.new_zeros(len(latents), 1, GLOBAL_WIDTH),
            rotary_embedding=self.rotary,
            return_dict=False,
        )[0]
        return velocity


def encode_all(codec: LinearMelCodec, mels: np.ndarray, chunk: int = 1000) -> Tensor:
    """Latents [N, 64, 64] float16 of all log-mels."""
    parts = [
        codec.encode(torch.from_numpy(np.asarray(mels[i : i + chunk], np.float32))).half()
        for i in range(0, len(mels), chunk)
    ]
    return torch.cat(parts)


def train(data: Path, out: Path, recipe: MusicRecipe) -> None:
    """Train to the end of the schedule, or continue a run that was cut off.

    Writes `codec/`, `state.pt` (to continue), `ema.safetensors` and `log.jsonl` into `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    mels = np.load(data / "train_mels.npy", mmap_mode="r")
    labels = np.load(data / "train_labels.npy")
    codec = LinearMelCodec()
    facts = codec.fit(mels)
    codec.save_pretrained(out / "codec")
    latents = encode_all(codec, mels)
    tokenizer = build_tokenizer()
    torch.manual_seed(recipe.seed)
    model = _Model(recipe, len(tokenizer))
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    alphas: Tensor = build_scheduler().alphas_cumprod
    step, seconds = 0, 0.0
    state_path = out / "state.pt"
    if state_path.exists():
        state: dict[str, Any] = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, seconds = state["average"], state["step"], state["seconds"]
    start, saved = time.perf_counter() - seconds, time.perf_counter()
    losses: list[float] = []
    progress = tqdm(total=recipe.steps, initial=step, desc="train music", unit="step")
    while step < recipe.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = _step_loss(model, recipe, step, latents, labels, tokenizer, alphas)
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(recipe.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(model.parameters()), 1.0 - decay)
        losses.append(loss.item())
        step += 1
        progress.update()
        if step % 50 == 0 or step == recipe.steps:
            row = {
                "step": step,
                "samples": step * recipe.batch,
                "loss": round(float(np.mean(losses)), 5),
                "lr": learning_rate(recipe, step),
                "seconds": round(time.perf_counter() - start, 1),
            }
            losses.clear()
            progress.set_postfix(loss=row["loss"])
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        if time.perf_counter() - saved > 60 * recipe.save_minutes or step == recipe.steps:
            seconds = time.perf_counter() - start
            _save(out, model, optimizer, average, step, seconds)
            saved = time.perf_counter()
    summary = {"recipe": asdict(recipe), "clips": len(latents), "seconds": round(seconds), **facts}
    write_text(out / "training.json", json.dumps(summary, indent=2) + "\n")


def _step_loss(
    model: _Model,
    recipe: MusicRecipe,
    step: int,
    latents: Tensor,
    labels: np.ndarray,
    tokenizer: Any,
    alphas: Tensor,
) -> Tensor:
    # All randomness of a step comes from (seed, step), so a continued run repeats the same batches.
    rng = np.random.default_rng([recipe.seed, step])
    generator = torch.Generator().manual_seed(recipe.seed * 10_000_019 + step)
    rows = rng.integers(0, len(latents), recipe.batch)
    texts = [caption(labels[row].tolist(), rng) for row in rows]
    ids = tokenizer(
        texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    keep = torch.from_numpy((rng.random(recipe.batch) >= recipe.drop_text).astype(np.int64))
    clean = latents[torch.from_numpy(rows)].float()
    noise = torch.randn(clean.shape, generator=generator)
    # stratified times: one in each of `batch` equal intervals
    uniform = torch.from_numpy(rng.permutation(recipe.batch) + rng.random(recipe.batch))
    times = (uniform / recipe.batch * TRAIN_TIMESTEPS).long().clamp(0, TRAIN_TIMESTEPS - 1)
    signal = alphas[times].sqrt()[:, None, None]
    sigma = (1.0 - alphas[times]).sqrt()[:, None, None]
    velocity = model(signal * clean + sigma * noise, times.float(), ids, keep)
    return (velocity - (signal * noise - sigma * clean)).square().mean()


def _save(
    out: Path,
    model: _Model,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    step: int,
    seconds: float,
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
        "step": step,
        "seconds": seconds,
    }
    with replacing(out / "state.pt") as partial:
        torch.save(state, partial)
    write_safetensors(out / "ema.safetensors", average)
