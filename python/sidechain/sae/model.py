# SPDX-License-Identifier: Apache-2.0
"""`Sae`: a dictionary of the activations at a site."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import InputError
from ..io.tensors import read_tensors, write_tensors
from ..ops import Codes, sparse_decode
from .architectures.registry import implementation, own_parameters
from .config import Provenance, SaeConfig
from .initialise import random_rows
from .normaliser import Normaliser
from .precision import wide

__all__ = ["Codes", "Sae"]

FORMAT = "sidechain.sae"
FORMAT_VERSION = 1
WEIGHTS = ("w_enc", "b_enc", "w_dec", "b_dec")
#: First threshold of a feature where none is trained.
_THRESHOLD = 0.001


class Sae(nn.Module):
    """A sparse autoencoder, or with `transcoder=True` a sparse map between two activations.

    With y = (x - mean[s]) / scale[s] and u = y - b_pre:

    - z = w_enc u + b_enc; a feature is active where the architecture says so and z > 0;
    - topk selects the k largest z of a token, batch_topk and matryoshka the N k largest of a batch
      while training and z > threshold afterwards, jumprelu z > threshold[f], relu z > 0;
    - gated: active where g = w_enc u + b_gate > 0, with z = exp(r_mag) (w_enc u) + b_enc;
    - x_hat = (sum_f z_f w_dec[f] + b_dec) * scale[s] + mean[s].

    `to(torch.bfloat16)` and `to(torch.float16)` round the weights; the normalisers stay in float32,
    and so does the arithmetic: the result is that of a float32 dictionary with the same rounded
    weights. float64 is computed by the references.

    Attributes:
        config: architecture and sizes.
        provenance: where it comes from.
        normaliser: of the input.
        target_normaliser: of the output; for an autoencoder the same object.
        w_enc: [F, d_in] parameter.
        b_enc: [F] parameter.
        w_dec: [F, d_out] parameter.
        b_dec: [d_out] parameter.
        b_pre: [d_in], subtracted before encoding: `b_dec` itself, or a buffer.
        threshold: batch_topk, matryoshka: [] buffer, NaN until trained; jumprelu: [F] parameter,
            not negative; otherwise None.
        b_gate, r_mag: [F] parameters of gated; otherwise None.
    """

    _b_pre: Tensor | None
    threshold: Tensor | None
    b_gate: Tensor | None
    r_mag: Tensor | None

    def __init__(
        self,
        config: SaeConfig,
        *,
        normaliser: Normaliser | None = None,
        target_normaliser: Normaliser | None = None,
        provenance: Provenance | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self._kind = implementation(config.architecture)
        self.provenance = provenance or Provenance()
        features, d_in, d_out = config.features, config.d_in, config.width_out
        self.normaliser = normaliser or Normaliser.identity(d_in)
        if target_normaliser is None:
            target_normaliser = Normaliser.identity(d_out) if config.transcoder else self.normaliser
        self.target_normaliser = target_normaliser
        w_dec = random_rows(seed, 0, 0, features, d_out)
        w_enc = random_rows(seed, 1, 0, features, d_in) if config.transcoder else w_dec.clone()
        self.w_enc = nn.Parameter(w_enc)
        self.w_dec = nn.Parameter(w_dec)
        self.b_enc = nn.Parameter(torch.zeros(features))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.register_buffer("_b_pre", None if config.tied_bias else torch.zeros(d_in))
        own = self._kind.own(features, _THRESHOLD)
        for name in ("threshold", *own_parameters()):
            first = own.get(name)
            if first is not None and first.dim():
                self.register_parameter(name, nn.Parameter(first))
            else:
                self.register_buffer(name, first)

    @property
    def b_pre(self) -> Tensor:
        """Vector subtracted from the normalised input, [d_in]."""
        return self.b_dec if self._b_pre is None else self._b_pre

    @b_pre.setter
    def b_pre(self, value: Tensor) -> None:
        if self._b_pre is None:
            raise ValueError("Sae: expected tied_bias=False to set b_pre, got b_pre = b_dec")
        with torch.no_grad():
            self._b_pre.copy_(value)

    def extra_repr(self) -> str:
        """Return the architecture for `repr`."""
        c = self.config
        width = f"{c.d_in}" if not c.transcoder else f"{c.d_in} -> {c.width_out}"
        chosen = "" if c.k is None else f", k={c.k}"
        return f"{c.architecture}, d={width}, features={c.features}{chosen}"

    # -- forward --------------------------------------------------------------------------------

    def encode(
        self,
        x: Tensor,
        *,
        step: int | Tensor | None = None,
        precision: str = "fp32",
        backend: str = "auto",
    ) -> Codes:
        """Return the active features of every token, in normalised units.

        Args:
            x: [..., d_in], any float dtype, on the device of the weights; leading dims are
                flattened to N rows.
            step: scheduler step of all rows or of each [N]; needed where the model normalises
                each step by itself.
            precision: "fp32" | "bf16" (not on a CPU) | "int8", see `sidechain.ops.topk_encode`.
            backend: of the op.

        Returns:
            values float32 (float64 of a float64 dictionary) and indices int32: [N, k] sorted by
            value with index -1 in empty slots (topk), or CSR with offsets [N + 1] (all others).

        Raises:
            TypeError: no tensor, or not of a float dtype.
            RuntimeError: on another device than the weights.
            ValueError: another width, an unknown step, or a threshold that was never trained.
        """
        y = self._normalised(x, step)
        return self._kind.encode(self, y, precision=precision, backend=backend)

    def thresholded_encoder(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """Return (w, b, t) with: a feature is active iff z = w u + b > t, with value z.

        t is never negative.

        Raises:
            ValueError: topk, which compares features of a token with each other, or a threshold
                that was never trained.
        """
        return self._kind.thresholded(self)

    def trained_threshold(self) -> Tensor:
        """Return `threshold` for every feature [F], not negative.

        Raises:
            ValueError: it was never trained.
        """
        if self.threshold is None or bool(self.threshold.isnan().any()):
            raise ValueError(
                f"Sae: expected a trained threshold [{self.config.architecture} in eval mode], got "
                "none: train it, or call train() to select over the batch"
            )
        return wide(self.threshold.detach()).clamp(min=0).expand(self.config.features)

    def preactivations(self, x: Tensor, *, step: int | Tensor | None = None) -> Tensor:
        """Return z [N, F] before any selection; dense, for looking at a few rows."""
        y = self._normalised(x, step)
        projected = (y - self.b_pre) @ self.w_enc.to(y.dtype).T
        gain = self._kind.gain(self)
        return (projected if gain is None else projected * gain) + self.b_enc

    def decode(
        self, codes: Codes, *, step: int | Tensor | None = None, backend: str = "auto"
    ) -> Tensor:
        """Return x_hat [N, d_out] in the units of the activations, in the dtype of the values.

        Args:
            codes: of `encode`; values may have been edited.
            step: as in `encode`.
            backend: of the op.
        """
        y = sparse_decode(
            codes.values, codes.indices, self.w_dec, wide(self.b_dec),
            offsets=codes.offsets, backend=backend,
        )  # fmt: skip
        return self.target_normaliser.restore(y, step)

    def forward(self, x: Tensor, *, step: int | Tensor | None = None) -> Tensor:
        """Return the reconstruction [..., d_out] of x [..., d_in] or of its target, dtype of x."""
        decoded = self.decode(self.encode(x, step=step), step=step)
        return decoded.reshape(*x.shape[:-1], self.config.width_out).to(x.dtype)

    def _normalised(self, x: Tensor, step: int | Tensor | None) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"Sae: expected x as a tensor of a float dtype, got {got}")
        if x.device != self.w_enc.device:
            raise RuntimeError(
                f"Sae: expected x on {self.w_enc.device} [device of the weights], got {x.device}"
            )
        if not x.dim() or x.shape[-1] != self.config.d_in:
            raise ValueError(
                f"Sae: expected x of shape [..., {self.config.d_in}] (d_in), got {list(x.shape)}"
            )
        rows = x.reshape(-1, self.config.d_in)
        if isinstance(step, Tensor) and step.dim() and step.numel() != len(rows):
            raise ValueError(
                f"Sae: expected step of shape [{len(rows)}] (rows of x), got {list(step.shape)}"
            )
        return self.normaliser.normalise(rows, step)

    # -- other forms ----------------------------------------------------------------------------

    def folded(self, step: int | None = None) -> Sae:
        """Return the same map at one step without a normaliser.

        Values come in the units of the activations; rows of `w_dec` keep their norm:
        with m, s of the input and m', s' of the output, b_pre' = s b_pre + m, and the encoder
        gives z' = s' z. In float32, or float64 as this one: half precision would lose the mean.

        Args:
            step: scheduler step. None where one entry serves all steps.
        """
        place, target_place = self.normaliser.entry(step), self.target_normaliser.entry(step)
        config = replace(self.config, tied_bias=False)
        made = Sae(config, provenance=self.provenance)
        if self.w_enc.dtype == torch.float64:
            made = made.double()
        with torch.no_grad():
            mean, scale = self.normaliser.mean[place], self.normaliser.scale[place]
            out_mean = self.target_normaliser.mean[target_place]
            out_scale = self.target_normaliser.scale[target_place]
            made.w_enc.copy_(wide(self.w_enc) * (out_scale / scale))
            made.b_enc.copy_(wide(self.b_enc) * out_scale)
            made.w_dec.copy_(self.w_dec)
            made.b_dec.copy_(wide(self.b_dec) * out_scale + out_mean)
            made.b_pre = wide(self.b_pre) * scale + mean
            for name, tensor in self._kind.scaled(self, out_scale).items():
                getattr(made, name).copy_(tensor)
        return made.to(self.w_enc.device).train(self.training)

    def normalise_decoder(self) -> None:
        """Give the rows of `w_dec` norm 1 and move their length into the encoder; same map."""
        with torch.no_grad():
            length = wide(self.w_dec).norm(dim=1)
            length = torch.where(length > 0, length, 1.0)
            self.w_dec.div_(length[:, None])
            self._kind.scale_encoder_(self, length)
            self.b_enc.mul_(length)

    # -- files ----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file with its provenance, all or nothing; the dtypes stay.

        Raises:
            OSError: the place cannot be written.
        """
        tensors = dict(self.weights())
        tensors |= self.normaliser.tensors("normaliser")
        if self.target_normaliser is not self.normaliser:
            # Copies: a file holds no memory twice, and two normalisers may share a mean.
            own = self.target_normaliser.tensors("target_normaliser")
            tensors |= {name: tensor.clone() for name, tensor in own.items()}
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": self.config.to_json(),
            "provenance": self.provenance.to_json(),
        }
        return write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: Any = None) -> Sae:
        """Read a file written by `save`; it comes in eval mode.

        Raises:
            FileNotFoundError: there is none.
            InputError: corrupted, incomplete, not finite, or another format.
        """
        tensors, metadata = read_tensors("Sae", Path(path), FORMAT, FORMAT_VERSION)
        try:
            lacking = [name for name in ("config", "provenance") if name not in metadata]
            if lacking:
                raise ValueError(f"expected {' and '.join(lacking)} in its header, got none")
            config = SaeConfig.from_json(metadata["config"])
            _check_file(config, tensors)
            own, target = (
                Normaliser.from_tensors(tensors, name)
                for name in ("normaliser", "target_normaliser")
            )
            sae = cls(
                config,
                normaliser=own,
                # One normaliser of both, also of a transcoder, is written once.
                target_normaliser=target or own,
                provenance=Provenance.from_json(metadata["provenance"]),
            )
            sae.fill(tensors)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"Sae: expected a complete file of format {FORMAT!r}, got {path}: {error}"
            ) from error
        return sae.to(device).eval()

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy weights named as in a file into this dictionary.

        Raises:
            ValueError: a tensor is missing, left over, of another shape, or not finite.
        """
        wanted = self.weights()
        given = {name: t for name, t in tensors.items() if "." not in name}
        if given.keys() != wanted.keys():
            raise ValueError(f"expected tensors {sorted(wanted)}, got {sorted(given)}")
        with torch.no_grad():
            for name, tensor in wanted.items():
                if tensor.shape != given[name].shape:
                    raise ValueError(
                        f"expected {name} of shape {list(tensor.shape)}, got "
                        f"{list(given[name].shape)}"
                    )
                if not given[name].is_floating_point():
                    got = str(given[name].dtype).removeprefix("torch.")
                    raise ValueError(f"expected {name} of a float dtype, got {got}")
                # A running threshold is NaN until it is trained.
                untrained = name == "threshold" and not tensor.dim()
                value = given[name].to(tensor.dtype)
                bad = value.isinf() if untrained else ~value.isfinite()
                if bool(bad.any()):
                    raise ValueError(f"expected finite {name}, got {int(bad.sum())} NaN or inf")
                tensor.copy_(value)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that the architecture has, by their names in a file."""
        names = (*WEIGHTS, *self.config.kind.tensors)
        found = {name: getattr(self, name) for name in names}
        return found if self.config.tied_bias else found | {"b_pre": self.b_pre}


def _check_file(config: SaeConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check the sizes of a file before memory for them is taken."""
    for name, size in (
        ("w_enc", (config.features, config.d_in)),
        ("w_dec", (config.features, config.width_out)),
        ("normaliser.mean", (None, config.d_in)),
        ("target_normaliser.mean", (None, config.width_out)),
    ):
        if name not in tensors:
            if name.startswith("target"):
                continue
            raise ValueError(f"expected a tensor {name}, got {sorted(tensors)}")
        found = tensors[name]
        fits = found.dim() == 2 and (size[0] or len(found), size[1]) == tuple(found.shape)
        if not fits:
            wanted = [size[0] or "S", size[1]]
            raise ValueError(f"expected {name} of shape {wanted}, got {list(found.shape)}")
