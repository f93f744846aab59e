# SPDX-License-Identifier: Apache-2.0
"""Write the model card of the music model from its training log and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...io.atomic import write_text

_HEAD = """---
license: apache-2.0
library_name: diffusers
tags: [text-to-audio, music, interpretability]
---
# sidechain zoo: music

Text to 5.12 seconds of 16 kHz music: a small diffusion transformer (diffusers'
`StableAudioDiTModel`, eight blocks of width 160, eight cross-attentions) on 64 x 64 latents of a
linear mel codec, with its own T5 encoder over about sixty words. It exists to be taken apart:
trained on labelled, rendered music, it really follows its prompts, and runs on a laptop.

```python
import sidechain
audio = sidechain.zoo.music()("a happy violin melody with drums").audios[0]  # [1, 81920], 16 kHz
```

It knows: piano, guitar, violin, cello, flute, trumpet, saxophone, xylophone; drums and vocals (a
choir) or none; slow, medium, fast; sad, happy; jazz, rock, techno, classical. Other words warn.
"""

_LIMITS = """
## Limits
- The scorers learned from the same renderer as the model and share its shortcuts: mood is scale,
  register, density and loudness together; vocals are a General MIDI choir; drums lean towards
  genres.
- Audio comes from Griffin-Lim and sounds like it. Score in latents or mels where you can.
- One training seed. Intervals are over prompts and noise, not over trainings.

## Data and licence
Clips were rendered with the FluidR3 sound font (MIT, Frank Wen); captions come from templates in
`sidechain.zoo.music`. Weights: Apache-2.0. `make zoo-music` makes all of it again from nothing.
"""


def card(training: dict[str, Any], evaluation: dict[str, Any], scorers: dict[str, Any]) -> str:
    """Write the text of the card.

    Args:
        training: `training.json` of the music model.
        evaluation: result of `evaluate.evaluate`.
        scorers: scorer name -> its `training.json`.
    """
    recipe = training["recipe"]
    lines = [
        _HEAD,
        "## Training",
        f"{recipe['steps']} steps of {recipe['batch']} "
        f"({recipe['steps'] * recipe['batch']:,} samples of {training['clips']:,} clips), "
        f"v-prediction, AdamW, learning rate {recipe['learning_rate']} with cosine decay, "
        f"EMA {recipe['ema']}; {training['seconds'] / 60:.0f} minutes on one CPU core. "
        "`training_log.jsonl` has the loss curve."
        + (f" {training['note']}" if "note" in training else ""),
        "",
        "## Does it do what it is told?",
        "Share of clips whose most probable class, by each scorer, is the one that a held-out "
        "prompt asks for, with 95 % Wilson intervals (20 steps, guidance 3). A third of the "
        "prompts has a sentence form that training never had.",
        "",
        "| prompts | n | asked of it | latent scorer | mel scorer | reached |",
        "|---|---|---|---|---|---|",
        *(_cell_line(row) for row in evaluation["cells"]),
        "",
        "Tempo cells add the share of clips with the opposite tempo (at most .10 asked).",
    ]
    missed = [row["cell"] for row in evaluation["cells"] if not _reached(row)]
    if missed:
        lines += ["", f"Below what was asked: {'; '.join(missed)}."]
        if "shortfall" in training:
            lines += [str(training["shortfall"])]
    if evaluation.get("witness"):
        lines += [
            "",
            "## An outside witness",
            "musicnn (trained by others on real music) hears the generated audio. AUC of its "
            "evidence for a concept between clips that asked for it and clips that did not; on "
            "rendered clips sent through the codec it reaches 0.76 to 0.93.",
            "",
            "| concept | AUC | clips with | without |",
            "|---|---|---|---|",
            *(
                f"| {row['concept']} | {row['auc']:.2f} | {row['with']} | {row['without']} |"
                for row in evaluation["witness"]
            ),
        ]
    lines += [
        "",
        "## The scorers",
        "| scorer | parameters | training clips | "
        + " | ".join(next(iter(scorers.values()))["accuracy"])
        + " |",
        "|---|---|---|" + "---|" * len(next(iter(scorers.values()))["accuracy"]),
        *(
            f"| {name} | {facts['parameters']:,} | {facts['clips']:,} | "
            + " | ".join(f"{value:.3f}" for value in facts["accuracy"].values())
            + " |"
            for name, facts in scorers.items()
        ),
        "",
        "Accuracy on 2,000 rendered test clips that neither scorer nor model saw.",
        _LIMITS,
    ]
    return "\n".join(lines)


def _reached(row: dict[str, Any]) -> bool:
    readings = [row["latent"], row["mel"]]
    return all(r["value"] >= row["bar"] and r.get("opposite", 0.0) <= 0.10 for r in readings)


def _cell_line(row: dict[str, Any]) -> str:
    def reading(entry: dict[str, float]) -> str:
        text = f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
        return text + (f", opposite {entry['opposite']:.2f}" if "opposite" in entry else "")

    return (
        f"| {row['cell']} | {row['n']} | {row['bar']:.2f} | {reading(row['latent'])} | "
        f"{reading(row['mel'])} | {'yes' if _reached(row) else 'no'} |"
    )


def write_card(music: Path, scorers: Path) -> None:
    """Write `music/README.md` from the JSON files in both folders."""
    facts = {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(scorers.glob("*/training.json"))
    }
    training = json.loads((music / "training.json").read_text())
    evaluation = json.loads((music / "evaluation.json").read_text())
    write_text(music / "README.md", card(training, evaluation, facts))
