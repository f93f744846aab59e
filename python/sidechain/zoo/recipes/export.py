# SPDX-License-Identifier: Apache-2.0
"""Turn a finished training into the pipeline and scorer folders that the package ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...io.atomic import write_text
from ..checksums import write_checksums
from ..music.captions import FILLERS
from ..music.codec import LinearMelCodec
from ..music.pipeline import MusicPipeline
from ..music.text import build_text_encoder, build_tokenizer
from .train_music import MusicRecipe, build_scheduler, build_transformer


def load_trained(run: Path, recipe: MusicRecipe) -> MusicPipeline:
    """Load the pipeline with the averaged weights of `run/ema.safetensors`, float32."""
    tokenizer = build_tokenizer()
    transformer = build_transformer(recipe)
    text_encoder = build_text_encoder(len(tokenizer))
    state = load_file(run / "ema.safetensors")
    for name, module in (("transformer", transformer), ("text_encoder", text_encoder)):
        part = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        missing, unexpected = module.load_state_dict(part, strict=False)
        tied = {"encoder.embed_tokens.weight"}
        if set(missing) - tied or unexpected:
            raise ValueError(
                f"export: expected weights of {name}, got missing {missing}, "
                f"unexpected {unexpected}"
            )
    _quiet_fillers(tokenizer, text_encoder)
    return MusicPipeline(
        tokenizer,
        text_encoder.eval(),
        transformer.eval(),
        build_scheduler(),
        LinearMelCodec.from_pretrained(run / "codec"),
    )


def _quiet_fillers(tokenizer: Any, text_encoder: Any) -> None:
    # Fillers and the unknown word were never trained: they get the meaning of the one article that
    # was, which is none.
    known = tokenizer.get_vocab()
    table = text_encoder.get_input_embeddings().weight
    untrained = [known[word] for word in (*FILLERS, tokenizer.unk_token)]
    with torch.no_grad():
        table[untrained] = table[known["a"]].clone()


def export_music(run: Path, target: Path, recipe: MusicRecipe) -> None:
    """Write the pipeline (float16 safetensors, codec float32) with its log and checksums."""
    pipe = load_trained(run, recipe)
    pipe.transformer.half()
    pipe.text_encoder.half()
    shutil.rmtree(target, ignore_errors=True)
    pipe.save_pretrained(target, safe_serialization=True)
    for path in target.rglob("config.json"):  # the path a part was loaded from is private
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        write_text(path, json.dumps(config, indent=2) + "\n")
    shutil.copy(run / "log.jsonl", target / "training_log.jsonl")
    shutil.copy(run / "training.json", target / "training.json")
    write_checksums(target)


def export_scorers(run: Path, target: Path) -> None:
    """Copy the scorers and write their checksums."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(run, target)
    write_checksums(target)


def facts(folder: Path) -> dict[str, object]:
    """Sizes of an exported folder, for the model card."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    summary: dict[str, object] = {"megabytes": round(sum(p.stat().st_size for p in files) / 1e6, 2)}
    training = folder / "training.json"
    if training.is_file():
        summary["training"] = json.loads(training.read_text())
    summary["torch"] = torch.__version__
    return summary
