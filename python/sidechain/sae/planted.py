# SPDX-License-Identifier: Apache-2.0
"""Rows with known features, to see whether a dictionary finds them.

    python -m sidechain.sae.planted planted.npy --rows 1000000 --width 512 --atoms 4096

writes planted.npy, to be mapped, and planted.atoms.npy with the true directions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._errors import InputError
from ..io.atomic import replacing

DTYPES = ("float16", "float32")
#: Rows that are drawn together, each lot by a seed of its own: any slice can be made again.
_LOT = 4096
#: Rows looked at together by `share_found`.
_CHUNK = 2048


@dataclass(frozen=True)
class Planted:
    """Rows x = sum_j c_j a_j + noise of unit directions a_j.

    Each row has `active` atoms, drawn alike and without repetition, with coefficients c uniform in
    [1, 2); the noise is normal. Row n depends on the settings, n and the seed alone, so that any
    slice is the same whatever was made before it.

    Attributes:
        rows: N.
        width: d.
        atoms: F directions, uniform on the sphere.
        active: K of a row.
        noise: standard deviation of each element.
        seed: of everything.

    Raises:
        InputError: sizes below 1, more active atoms than there are, or a noise that is negative.
    """

    rows: int
    width: int
    atoms: int
    active: int = 8
    noise: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "width", "atoms", "active"):
            if getattr(self, name) < 1:
                raise InputError(f"planted: expected {name} >= 1, got {getattr(self, name)}")
        if self.active > self.atoms:
            raise InputError(f"planted: expected active <= {self.atoms} [atoms], got {self.active}")
        if not 0 <= self.noise < float("inf"):
            raise InputError(f"planted: expected noise >= 0, got {self.noise}")
        if self.seed < 0:
            raise InputError(f"planted: expected seed >= 0, got {self.seed}")

    def directions(self) -> NDArray[np.float32]:
        """Return the atoms [F, d], of unit norm."""
        found = self._generator(0).standard_normal((self.atoms, self.width), dtype=np.float32)
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        return found

    def slice(
        self, start: int, stop: int, directions: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Return rows [start, stop) [n, d].

        Args:
            start: number of the first row.
            stop: number after the last one.
            directions: those of `directions`, so that they are not drawn again.

        Raises:
            InputError: rows that are not there.
        """
        if not 0 <= start <= stop <= self.rows:
            raise InputError(
                f"planted: expected 0 <= start <= stop <= {self.rows}, got {start} and {stop}"
            )
        atoms = self.directions() if directions is None else directions
        out = np.empty((stop - start, self.width), np.float32)
        for lot in range(start // _LOT, -(-stop // _LOT)):
            first = max(start, lot * _LOT)
            last = min(stop, (lot + 1) * _LOT)
            made = self._lot(lot, atoms)
            out[first - start : last - start] = made[first - lot * _LOT : last - lot * _LOT]
        return out

    def _lot(self, lot: int, atoms: NDArray[np.float32]) -> NDArray[np.float32]:
        g = self._generator(lot + 1)
        chosen = self._chosen(g)
        coefficients = 1 + g.random((_LOT, self.active), dtype=np.float32)
        x = self.noise * g.standard_normal((_LOT, self.width), dtype=np.float32)
        for place in range(self.active):
            x += coefficients[:, place, None] * atoms[chosen[:, place]]
        return x

    def _chosen(self, g: np.random.Generator) -> NDArray[np.int64]:
        """Draw the atoms of each row [_LOT, K], none twice (Floyd's algorithm, all rows at once).

        Source: Bentley and Floyd 1987, "A sample of brilliance".
        """
        chosen = np.empty((_LOT, self.active), np.int64)
        for place in range(self.active):
            last = self.atoms - self.active + place
            drawn = g.integers(0, last + 1, _LOT)
            taken = (chosen[:, :place] == drawn[:, None]).any(1)
            chosen[:, place] = np.where(taken, last, drawn)
        return chosen

    def _generator(self, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, number]))


def planted_rows(
    rows: int, width: int, atoms: int, *, active: int = 8, noise: float = 0.01, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return planted rows [N, d] and their atoms [F, d], float32; see `Planted`."""
    plan = Planted(rows, width, atoms, active, noise, seed)
    directions = plan.directions()
    return torch.from_numpy(plan.slice(0, rows, directions)), torch.from_numpy(directions)


def write_planted(
    out: str | os.PathLike[str], plan: Planted, *, dtype: str = "float16"
) -> tuple[Path, Path]:
    """Write planted rows as a .npy file, lot by lot, and the atoms beside it.

    Args:
        out: path of the file, ending in .npy.
        plan: what to write.
        dtype: float16 | float32 of the rows; the atoms are float32.

    Returns:
        Paths of the rows and of the atoms, NAME.atoms.npy.

    Raises:
        InputError: another dtype or suffix.
        OSError: a full disk; nothing is left behind.
    """
    place = Path(out)
    if place.suffix != ".npy":
        raise InputError(f"planted: expected a file ending in .npy, got {place}")
    if dtype not in DTYPES:
        raise InputError(f"planted: expected dtype to be one of {', '.join(DTYPES)}, got {dtype!r}")
    beside = place.with_suffix(".atoms.npy")
    directions = plan.directions()
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
    with replacing(place, parents=True) as temporary, open(temporary, "wb") as file:
        shape: Any = (plan.rows, plan.width)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
        for start in range(0, plan.rows, _LOT):
            made = plan.slice(start, min(start + _LOT, plan.rows), directions)
            file.write(made.astype(dtype).tobytes())
        file.flush()
        with replacing(beside) as other, open(other, "wb") as atoms:
            np.save(atoms, directions)
    return place, beside


def share_found(
    dictionary_rows: Tensor | NDArray[Any], atoms: Tensor | NDArray[Any], cosine: float = 0.95
) -> float:
    """Return the share of atoms that some row of a dictionary points along.

    Args:
        dictionary_rows: decoder rows [F, d], of any norm.
        atoms: true directions [A, d].
        cosine: least cosine similarity; its sign counts.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, wanted = (torch.as_tensor(t).detach().cpu().float() for t in (dictionary_rows, atoms))
    if rows.dim() != 2 or wanted.dim() != 2 or rows.shape[1] != wanted.shape[1] or not len(wanted):
        raise ValueError(
            "share_found: expected rows [F, d] and atoms [A, d] of one width, got "
            f"{list(rows.shape)} and {list(wanted.shape)}"
        )
    if not len(rows):
        return 0.0
    rows, wanted = (torch.nn.functional.normalize(t, dim=1) for t in (rows, wanted))
    best = torch.cat([(part @ rows.T).amax(1) for part in wanted.split(_CHUNK)])
    return float((best >= cosine).double().mean())


def main(argv: Sequence[str] | None = None) -> int:
    """Write planted rows and print where they are."""
    parser = argparse.ArgumentParser("python -m sidechain.sae.planted", description=__doc__)
    parser.add_argument("out", help="file of the rows, NAME.npy; the atoms go to NAME.atoms.npy")
    for name in ("rows", "width", "atoms"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--active", type=int, default=Planted.active, help="atoms of a row")
    parser.add_argument("--noise", type=float, default=Planted.noise, help="of each element")
    parser.add_argument("--seed", type=int, default=Planted.seed)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    given = vars(parser.parse_args(argv))
    out, dtype = given.pop("out"), given.pop("dtype")
    try:
        for path in write_planted(out, Planted(**given), dtype=dtype):
            print(path)
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
