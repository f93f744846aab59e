# SPDX-License-Identifier: Apache-2.0
"""State of a training run: tensors of the features that this process owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..._errors import InputError
from ..architectures.registry import implementation
from ..config import Provenance, SaeConfig
from ..initialise import geometric_median, random_rows
from ..model import Sae
from ..normaliser import Normaliser
from .l0_control import L0Control
from .mesh import Mesh
from .rows import Rows
from .train_config import Schedule, TrainConfig

MATRICES = ("w_enc", "w_dec")
#: Name in a checkpoint of what controls a penalty.
CONTROL = "l0_control"

# Elements of [rows, F] held at a time.
_HELD = 1 << 24


class TrainState:
    """Weights, running statistics and counters of a run.

    Attributes:
        weights: trained tensors by name, the slice of this process; a threshold that follows the
            batches is among them though no gradient reaches it.
        adam: running (mean, mean square) of the gradient of each trained tensor.
        last_fired: [F'] int64, number of the step (from 1) in which a feature last fired.
        dead: local numbers of the features in the dead mask when it was last updated, int64.
        dead_total: number of them over all processes.
        smallest: smallest value that the last batch selected, where a threshold follows it, or
            None. It is not saved: no result depends on it.
        prefixes: of the config, [P] int64 on the device.
        step: steps done.
        fixed_b_pre: [d_in] of an untied bias, or None.
        control: of the penalty's coefficient, where an L0 is asked for, or None.
    """

    def __init__(
        self,
        config: SaeConfig,
        train: TrainConfig,
        normaliser: Normaliser,
        target_normaliser: Normaliser | None = None,
        *,
        mesh: Mesh | None = None,
        device: Any = "cpu",
        dtype: torch.dtype = torch.float32,
        first: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config, self.train = config, train
        self.schedule = Schedule(config, train)
        self.mesh = mesh or Mesh()
        self.device = torch.device(device)
        self.normaliser = normaliser.to(self.device)
        self.target_normaliser = (
            self.normaliser if target_normaliser is None else target_normaliser.to(self.device)
        )
        # Looked up once: it waits for the device.
        self._as_given = {n for n in (self.normaliser, self.target_normaliser) if n.is_identity}
        self.first, stop = self.mesh.shard(config.features)
        self.mesh.rows(train.batch)
        self.size = stop - self.first
        self.step = 0
        self.started = first is not None
        begun = self._initial(stop) if first is None else self._slice_of(first, stop)
        b_pre = begun.pop("b_pre", torch.zeros(config.d_in))
        self.weights = {name: t.to(self.device, dtype, copy=True) for name, t in begun.items()}
        self.fixed_b_pre = None if config.tied_bias else b_pre.to(self.device, dtype, copy=True)
        self.adam = {name: self._zeros(name) for name in self.trained}
        self.last_fired = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        self.dead = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.dead_total = 0
        self.smallest: Tensor | None = None
        self.prefixes = torch.tensor(config.prefixes, dtype=torch.int64, device=self.device)
        goal = self.schedule.l0
        self.control: L0Control | None = None
        if goal is not None:
            start = implementation(config.architecture).first_sparsity(self.schedule, goal)
            self.control = L0Control(goal, start, train.steps, self.device)

    def _initial(self, stop: int) -> dict[str, Tensor]:
        config, size, seed = self.config, self.size, self.train.seed
        w_dec = random_rows(seed, 0, self.first, stop, config.width_out)
        w_enc = w_dec.clone()
        if config.transcoder:
            w_enc = random_rows(seed, 1, self.first, stop, config.d_in)
        return {
            "w_enc": w_enc,
            "w_dec": w_dec,
            "b_enc": torch.zeros(size),
            "b_dec": torch.zeros(config.width_out),
            **implementation(config.architecture).own(size, self.schedule.first_limit),
        }

    def _slice_of(self, whole: Mapping[str, Tensor], stop: int) -> dict[str, Tensor]:
        """Return the part of this process of the weights of all features."""
        everywhere = ("b_dec", "b_pre")
        return {
            name: t if name in everywhere or not t.dim() else t[self.first : stop]
            for name, t in whole.items()
        }

    def _zeros(self, name: str) -> tuple[Tensor, Tensor]:
        weight = self.weights[name]
        narrow = self.train.bf16_moments and name in MATRICES
        zero = torch.zeros_like(weight, dtype=torch.bfloat16 if narrow else weight.dtype)
        return zero, zero.clone()

    @property
    def trained(self) -> list[str]:
        """Names of the weights that gradients reach."""
        return [n for n, t in self.weights.items() if n != "threshold" or t.dim()]

    @property
    def b_pre(self) -> Tensor:
        """Vector subtracted before encoding, [d_in]."""
        return self.weights["b_dec"] if self.fixed_b_pre is None else self.fixed_b_pre

    @property
    def row_weight(self) -> float:
        """Factor w of the loss sum_n w |e_n|^2 / 2 over all rows of a batch."""
        return 2.0 / (self.train.batch * self.config.width_out)

    def start_biases(self, rows: Rows) -> None:
        """Set `b_dec`, and an untied `b_pre`, to the middle of the first batch.

        Where a penalty decides what fires, also the first limits of the features. A run that
        started from a dictionary keeps its own.
        """
        kind = self.train.bias_init
        if self.started:
            return
        x, target = (self.mesh.gather_rows(t) for t in self.normalised(rows))
        if kind != "zero":
            middle = geometric_median if kind == "geometric_median" else _mean
            self.weights["b_dec"].copy_(middle(target))
            if self.fixed_b_pre is not None:
                self.fixed_b_pre.copy_(middle(x))
        if self.config.kind.takes("sparsity"):
            self._start_limits(x)

    def _start_limits(self, x: Tensor) -> None:
        """Let each feature fire in the share of the rows x that L0 asks for.

        The limit is `first_limit` standard deviations of what its encoder row sees; rows that
        differ in one direction more than in others would otherwise start most features dead.
        """
        limit = torch.full_like(self.weights["b_enc"], self.schedule.first_limit)
        if self.train.threshold_init is None:
            limit *= spread(x - self.b_pre, self.weights["w_enc"])
        for name, first in implementation(self.config.architecture).limited(limit).items():
            self.weights[name].copy_(first)

    def sparsity(self) -> float | Tensor:
        """Return the coefficient of the penalty at the next step; a float64 tensor if it moves."""
        if self.control is not None:
            return self.control.coefficient
        return self.schedule.sparsity(self.step)

    def normalised(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the normalised input and target of a batch, float32.

        They may be the memory of `rows`: nobody writes to them.
        """
        x = self._normalise(self.normaliser, rows.x, rows)
        if (rows.target is not None) != self.config.transcoder:
            wanted, got = ("a target", "none") if self.config.transcoder else ("no target", "one")
            raise InputError(
                f"TrainState: expected rows with {wanted} [transcoder={self.config.transcoder}], "
                f"got {got}"
            )
        if rows.target is None:
            return x, x
        return x, self._normalise(self.target_normaliser, rows.target, rows)

    def _normalise(self, normaliser: Normaliser, x: Tensor, rows: Rows) -> Tensor:
        """Return normalised rows, in row-major order whatever that of x: the ops need it."""
        if normaliser in self._as_given:
            return x.to(normaliser.mean.dtype).contiguous()
        return normaliser.normalise(x, rows.step).contiguous()

    def not_finite(self) -> str:
        """Return the name of a tensor that is not finite; "" = all are. It waits for the device.

        A running threshold is NaN until a batch has selected something.
        """
        for name, tensor, _ in self.named():
            running = name == "threshold" and tensor.dim() == 0
            if tensor.is_floating_point() and not running and not bool(tensor.isfinite().all()):
                return name
        return ""

    def update_dead(self) -> None:
        """Update the set of dead features; the one place of a step that waits for the device."""
        mask = self.dead_mask()
        self.dead = mask.nonzero()[:, 0]
        self.dead_total = int(self.mesh.sum_features(mask.sum()))

    def dead_mask(self) -> Tensor:
        """Return which features are dead after this step, [F'] bool."""
        return self.step - self.last_fired >= self.schedule.dead_steps

    def named(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Yield (name, tensor, whether its first axis is cut over the features)."""
        for name, tensor in self.weights.items():
            yield name, tensor, name != "b_dec" and tensor.dim() > 0
        for name, pair in self.adam.items():
            for kind, tensor in zip(("mean", "square"), pair, strict=True):
                yield f"{name}.{kind}", tensor, name != "b_dec"
        yield "last_fired", self.last_fired, True
        if self.fixed_b_pre is not None:
            yield "b_pre", self.fixed_b_pre, False
        if self.control is not None:
            yield CONTROL, self.control.values, False

    def to_sae(self, provenance: Provenance | None = None) -> Sae:
        """Return the dictionary as it is now, whole, on the CPU, in eval mode.

        Every process of a mesh has to call it.
        """
        parts = {}
        for name, tensor in self.weights.items():
            whole = tensor.dim() == 0 or name == "b_dec"
            parts[name] = tensor if whole else self.mesh.gather_features(tensor)
        sae = Sae(
            self.config,
            normaliser=self.normaliser.copy(),
            target_normaliser=(
                self.target_normaliser.copy()
                if self.target_normaliser is not self.normaliser
                else None
            ),
            provenance=provenance,
        )
        with torch.no_grad():
            for name, tensor in parts.items():
                getattr(sae, name).copy_(tensor)
            if self.fixed_b_pre is not None:
                sae.b_pre = self.fixed_b_pre.float().cpu()
        return sae.eval()


def spread(x: Tensor, w: Tensor) -> Tensor:
    """Return the root mean square of w x over rows x [N, d], for each row of w [F, d], [F]."""
    products = (x @ rows.T for rows in w.split(max(1, _HELD // len(x))))
    return torch.cat([p.square().mean(0).sqrt() for p in products])


def _mean(x: Tensor) -> Tensor:
    return x.mean(0, dtype=torch.float64)
