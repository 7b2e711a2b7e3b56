"""Observables that are made of energies and stresses, and so depend on a potential's parameters themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ase import units
from torch import Tensor

from stabie_ase.observables.base import Axis, Observable
from stabie_ase.observables.energetics import Energetics
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.setting import Setting
from stabie_ase.structures.topology import Groups
from stabie_ase.system.spec import Spec

VOIGT = {"xx": (0, 0), "yy": (1, 1), "zz": (2, 2), "yz": (1, 2), "xz": (0, 2), "xy": (0, 1)}
"""Components in the order of ASE's stresses."""


class Thermodynamic(Observable):
    """An observable of what a potential says of whole frames, not of where their atoms are.

    Since g contains the parameters θ, ∂⟨g⟩/∂θ has the term ⟨∂g/∂θ⟩ beside the covariance (`Estimator`).

    """

    needs = frozenset({"energy"})

    def of(self, frames: Energetics) -> Tensor:
        """g of every frame, float64, shape (n_frames, width), differentiable in energies and stresses."""
        raise NotImplementedError

    def __call__(self, frames: AtomsBatch, groups: Groups | None = None) -> Tensor:
        """Atoms alone do not tell it: ValueError."""
        raise ValueError(f"{self.name} is of the energies of whole systems, which where their atoms are does not tell")

    def sample(self, frames: AtomsBatch, groups: Groups | None = None, energetics: Energetics | None = None) -> Tensor:
        """g of every frame, shape (n_frames, width); ValueError for groups of their atoms."""
        if groups is not None and groups.n_groups != frames.n_systems:
            raise ValueError(f"{self.name} is of whole systems, not of groups of their atoms; give --estimator global")
        return self(frames) if energetics is None else self.of(energetics)

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> Thermodynamic:
        """Without options."""
        spec.read({})
        return cls()


@dataclass(frozen=True)
class PotentialEnergy(Thermodynamic):
    """Mean potential energy of an atom, ⟨U⟩/N, in eV, on the scale of the reference (Allen & Tildesley, 2nd ed., section 2.4)."""

    name, label = "potential-energy", "potential energy (eV/atom)"
    axis = Axis.of_names("", ["U/N"])

    def of(self, frames: Energetics) -> Tensor:
        """U/N in eV, shape (n_frames, 1)."""
        return (frames.energies / frames.sizes)[:, None]


@dataclass(frozen=True)
class HeatCapacity(Thermodynamic):
    """The potential energy's part of the heat capacity at constant volume, in k_B an atom.

    C = (⟨U²⟩ - ⟨U⟩²) / (N k_B² T²) (Allen & Tildesley, 2nd ed., eq. 2.80); classical momenta add 3/2. Samples are x = U / (N^½ k_B T)
    and x², and C = ⟨x²⟩ - ⟨x⟩²; all frames have one number of atoms.

    Parameters
    ----------
    temperature_K : float
    """

    temperature_K: float
    name, label, width = "heat-capacity", "heat capacity (k_B/atom)", 2
    axis = Axis.of_names("", ["C"])

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting) -> HeatCapacity:
        """`heat-capacity`."""
        spec.read({})
        _check_temperature(cls.name, setting)
        sizes = sorted({len(atoms) for atoms in setting.frames})
        if len(sizes) > 1:
            raise ValueError(f"a heat capacity is of systems of one size, these have from {sizes[0]} to {sizes[-1]} atoms")
        return cls(setting.temperature_K)

    def of(self, frames: Energetics) -> Tensor:
        """x and x² of every frame, shape (n_frames, 2), without a unit."""
        x = frames.energies / (frames.sizes.sqrt() * units.kB * self.temperature_K)
        return torch.stack([x, x.square()], dim=1)

    def statistic(self, mean: Tensor) -> Tensor:
        """C from the means of x and x², shape (..., 2), as (..., 1), in k_B an atom."""
        return mean[..., 1:] - mean[..., :1].square()


@dataclass(frozen=True)
class OfStress(Thermodynamic):
    """What is made of the stress of a periodic system at a temperature.

    Parameters
    ----------
    temperature_K : float
    """

    temperature_K: float
    needs = frozenset({"energy", "stress"})

    @classmethod
    def from_spec(cls, spec: Spec, setting: Setting):
        """Without options."""
        spec.read({})
        _check_temperature(cls.name, setting)
        if not all(atoms.pbc.all() for atoms in setting.frames):
            raise ValueError(f"{cls.name} needs a reference that is periodic in all directions; a molecule has no volume")
        return cls(setting.temperature_K)

    def pressure_tensor(self, frames: Energetics) -> Tensor:
        """N k_B T / V - σ in GPa, shape (n_frames, 3, 3), σ being the stress of the atoms without their momenta."""
        assert frames.stress is not None
        ideal = frames.sizes * units.kB * self.temperature_K / frames.volumes
        return (torch.eye(3).to(frames.stress) * ideal[:, None, None] - frames.stress) / units.GPa


@dataclass(frozen=True)
class Pressure(OfStress):
    """Pressure P = N k_B T / V - tr σ / 3, in GPa, σ being the stress (1/V) ∂U/∂ε (Allen & Tildesley, 2nd ed., eq. 2.60).

    Momenta are taken at their mean: so it is -∂A/∂V of the free energy at constant volume.

    Parameters
    ----------
    temperature_K : float
    """

    name, label = "pressure", "pressure (GPa)"
    axis = Axis.of_names("", ["P"])

    def of(self, frames: Energetics) -> Tensor:
        """P in GPa, shape (n_frames, 1)."""
        return self.pressure_tensor(frames).diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)


@dataclass(frozen=True)
class Stress(OfStress):
    """Stress σ - 1 N k_B T / V, in GPa, positive under tension as ASE has it, σ being (1/V) ∂U/∂ε; in Voigt's order.

    Minus the mean of its first three components is `Pressure`. Momenta are taken at their mean (Allen & Tildesley, 2nd ed., section 2.4).

    Parameters
    ----------
    temperature_K : float
    """

    name, label = "stress", "stress (GPa)"
    axis = Axis.of_names("", list(VOIGT))

    def of(self, frames: Energetics) -> Tensor:
        """Six components in GPa, shape (n_frames, 6)."""
        tensor = -self.pressure_tensor(frames)
        return torch.stack([tensor[:, a, b] for a, b in VOIGT.values()], dim=1)


def _check_temperature(name: str, setting: Setting) -> None:
    if not setting.temperature_K > 0:
        raise ValueError(f"{name} needs a temperature, which the frames do not tell; give --temperature in K")
