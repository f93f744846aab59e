# SPDX-License-Identifier: Apache-2.0
"""`Implementation`: what the file of an architecture provides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...ops import Codes, Encoder, topk_encode
from ..precision import wide

if TYPE_CHECKING:
    from ..model import Sae
    from ..training.state import TrainState
    from ..training.train_config import Schedule


class Loss(NamedTuple):
    """Loss of a tile of rows.

    Attributes:
        total: to be differentiated.
        error: x_hat - target [n, d_out], detached.
        active: number of active features here.
        fired: [F'] number of rows in which each own feature is active.
        smallest: smallest value selected, inf where none is; for the running threshold.
    """

    total: Tensor
    error: Tensor
    active: Tensor
    fired: Tensor
    smallest: Tensor


class SaeLensLayout(NamedTuple):
    """How SAELens keeps an architecture.

    Attributes:
        written: its word for it when a file is written.
        read: its word in a file that is read back as this architecture; "" = it has none.
        transcoder: its word for a transcoder; "" = it has none.
        tensors: our name -> its name, where they differ from the common ones.
    """

    written: str
    read: str = ""
    transcoder: str = ""
    tensors: Mapping[str, str] = {}


class ClassLayout(NamedTuple):
    """How a class of dictionary_learning keeps an architecture.

    Attributes:
        name: of the class.
        tensors: our name -> its name, but for the matrices.
        linear: the matrices are those of linear layers; otherwise W_enc and W_dec.
        subtracts: b_dec is subtracted from the input.
        unit_norm: decoder rows are scaled to norm 1 when it is opened.
    """

    name: str
    tensors: Mapping[str, str]
    linear: bool = True
    subtracts: bool = True
    unit_norm: bool = False


class Implementation:
    """How an architecture encodes, learns and is kept in the files of other libraries.

    It has no state: the dictionary or the state of a run is handed in. What is given here fits an
    architecture without a selection, without a threshold and without tensors of its own.
    """

    saelens: SaeLensLayout
    #: Classes of dictionary_learning; the first that fits is written.
    classes: tuple[ClassLayout, ...] = ()
    #: Its activation in sparsify; "" = sparsify does not hold it.
    sparsify = ""

    def own(self, features: int, threshold: float) -> dict[str, Tensor]:
        """Return the first values of its threshold and `parameters`, by name.

        Args:
            features: number of features here.
            threshold: first value of a trained threshold.
        """
        return {}

    def first_sparsity(self, schedule: Schedule, l0: float) -> float:
        """Return the coefficient of the penalty from which one is found that leaves l0 active.

        sqrt(d / l0), the size of an active value where E|y|^2 = d: an L1 penalty takes half of its
        coefficient from each.
        """
        return math.sqrt(schedule.config.width_out / l0)

    def limited(self, limit: Tensor) -> dict[str, Tensor]:
        """Return the tensors that let a feature fire where w_enc u is above its limit [F] > 0."""
        return {}

    def encode(self, sae: Sae, y: Tensor, **options: Any) -> Codes:
        """Return the active features of normalised rows y [N, d_in]; options as `topk_encode`."""
        w_enc, b_enc, threshold = self.thresholded(sae)
        encoder = Encoder(w_enc, b_enc, sae.b_pre)
        return topk_encode(y, encoder, mode="threshold", threshold=threshold, **options)

    def thresholded(self, sae: Sae) -> tuple[Tensor, Tensor, float | Tensor]:
        """Return (w, b, t) as `Sae.thresholded_encoder`."""
        raise NotImplementedError

    def gain(self, sae: Sae) -> Tensor | None:
        """Return the factor [F] between w_enc u and z - b_enc; None = 1."""
        return None

    def loss(
        self, state: TrainState, weights: dict[str, Tensor], x: Tensor, target: Tensor
    ) -> Loss:
        """Return the loss of rows x [n, d_in], target [n, d_out], as part of the batch's.

        Args:
            state: settings and counters.
            weights: by name, and `b_pre`, a leaf of its own even where it equals `b_dec`: its
                gradient is a sum over features, that of `b_dec` is not.
            x: normalised input.
            target: normalised target.
        """
        raise NotImplementedError

    def select(
        self, state: TrainState, k: int, x: Tensor, weights: dict[str, Tensor], **options: Any
    ) -> Codes:
        """Return the codes of own features that a selection keeps, over all slices of features."""
        raise NotImplementedError

    # -- other forms of the same map ------------------------------------------------------------

    def scaled(self, sae: Sae, factor: Tensor) -> dict[str, Tensor]:
        """Return its own tensors for values that are `factor` times as large."""
        return {name: tensor * factor for name, tensor in self.own_of(sae).items()}

    def scale_encoder_(self, sae: Sae, length: Tensor) -> None:
        """Multiply the values by `length` [F] in place, all but their `b_enc`."""
        sae.w_enc.mul_(length[:, None])

    def moved(self, sae: Sae, shift: Tensor) -> dict[str, Tensor]:
        """Return b_enc and own tensors for an input from which something else is subtracted.

        Args:
            sae: the dictionary.
            shift: w_enc (s - b_pre) [F] float64, s what is subtracted then.
        """
        return {"b_enc": (sae.b_enc.detach().double() + shift).float(), **self.own_of(sae)}

    def extended(self, own: Mapping[str, Tensor], extra: int) -> dict[str, Tensor]:
        """Return own tensors with `extra` more features behind the old ones, of their mean."""
        return {
            name: torch.cat([tensor, tensor.mean().expand(extra)]) if tensor.dim() else tensor
            for name, tensor in own.items()
        }

    def own_of(self, sae: Sae) -> dict[str, Tensor]:
        """Return its threshold and `parameters` of a dictionary, by name, at least float32."""
        return {name: wide(getattr(sae, name).detach()) for name in sae.config.kind.tensors}
