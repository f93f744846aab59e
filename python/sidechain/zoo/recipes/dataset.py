# SPDX-License-Identifier: Apache-2.0
"""Render the training and test clips of the music model into log-mel arrays."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ...io.atomic import replacing, write_text
from ..music.attributes import ATTRIBUTES, draw
from ..music.codec import log_mel

CHUNK = 250
#: Test clips have seeds from here on, training clips below.
TEST_SEED = 1_000_000


def _render_chunk(seeds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    from ..music.render import Renderer

    render = Renderer()
    clips = [draw(seed) for seed in seeds]
    mels = np.stack([log_mel(render(clip)) for clip in clips]).astype(np.float16)
    return mels, np.array([clip.labels() for clip in clips], np.int64)


def build(folder: Path, *, train: int, test: int, workers: int | None = None) -> None:
    """Write `train_mels.npy` [N, 256, 64] f16 and `train_labels.npy` [N, 6], and the same for test.

    Finished parts are kept: a second call with the same counts renders nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, first in (("train", train, 0), ("test", test, TEST_SEED)):
        mels_path, labels_path = folder / f"{split}_mels.npy", folder / f"{split}_labels.npy"
        if labels_path.exists() and len(np.load(labels_path, mmap_mode="r")) == count:
            continue
        seeds = list(range(first, first + count))
        chunks = [seeds[i : i + CHUNK] for i in range(0, count, CHUNK)]
        temporary = folder / f"{split}_mels.partial.npy"
        mels = np.lib.format.open_memmap(  # type: ignore[no-untyped-call, unused-ignore]
            temporary, mode="w+", dtype=np.float16, shape=(count, 256, 64)
        )
        labels = np.empty((count, len(ATTRIBUTES)), np.int64)
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            results = tqdm(
                pool.map(_render_chunk, chunks), total=len(chunks), desc=f"render {split}"
            )
            for index, (chunk_mels, chunk_labels) in enumerate(results):
                start = index * CHUNK
                mels[start : start + len(chunk_mels)] = chunk_mels
                labels[start : start + len(chunk_labels)] = chunk_labels
        mels.flush()
        del mels
        os.replace(temporary, mels_path)
        with replacing(labels_path) as partial, open(partial, "wb") as file:
            np.save(file, labels)
    facts = {
        "train": train,
        "test": test,
        "attributes": {k: list(v) for k, v in ATTRIBUTES.items()},
    }
    write_text(folder / "dataset.json", json.dumps(facts, indent=2))
