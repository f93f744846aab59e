# SPDX-License-Identifier: Apache-2.0
"""Describe a family of tiny pipelines: how to build one and how to call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# (layers, scheduler) -> pipeline
Builder = Callable[[int, Any], Any]
# (pipeline, prompts) -> arguments of the call, beside steps and generators
Arguments = Callable[[Any, list[str]], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """A kind of tiny pipeline.

    Attributes:
        build: makes the pipeline from a number of layers and a scheduler.
        arguments: makes the arguments of a call from the pipeline and its prompts.
        pipelines: names of the classes that are called this way.
        layers: transformer blocks by default; of a U-Net, blocks of every transformer.
        scheduler: name of the default scheduler (`schedulers.SCHEDULERS`). None = made by `build`.
        per_prompt: argument that asks for several samples of a prompt. None = there is none.
    """

    build: Builder
    arguments: Arguments
    pipelines: tuple[str, ...]
    layers: int = 2
    scheduler: str | None = "ddim"
    per_prompt: str | None = None


def prompted(**fixed: Any) -> Arguments:
    """Make the arguments of a pipeline that reads prompts.

    Args:
        **fixed: arguments that are the same in every call.
    """

    def arguments(_pipe: Any, prompts: list[str]) -> dict[str, Any]:
        return {"prompt": prompts, **fixed}

    return arguments


def labelled(classes: int, **fixed: Any) -> Arguments:
    """Make the arguments of a pipeline that reads class labels: a prompt stands for one of them.

    Args:
        classes: number of labels.
        **fixed: arguments that are the same in every call.
    """

    def arguments(_pipe: Any, prompts: list[str]) -> dict[str, Any]:
        labels = [_checksum(prompt) % classes for prompt in prompts]
        return {"class_labels": labels, **fixed}

    return arguments


def unconditional(**fixed: Any) -> Arguments:
    """Make the arguments of a pipeline without a condition: prompts only count the samples."""

    def arguments(_pipe: Any, prompts: list[str]) -> dict[str, Any]:
        return {"batch_size": len(prompts), **fixed}

    return arguments


def _checksum(text: Sequence[str]) -> int:
    # `hash` of a string differs from one process to the next.
    return sum((i + 1) * ord(letter) for i, letter in enumerate(text))
