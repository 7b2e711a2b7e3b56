"""Constant pressure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from ase import units
from torch import Tensor

from stabie_ase.dynamics.integrators import Langevin
from stabie_ase.dynamics.random import CELL, system_normals
from stabie_ase.dynamics.state import MDState


@dataclass(frozen=True)
class StochasticCellRescaling(Langevin):
    """Constant temperature and pressure: Langevin dynamics with a stochastically rescaled cell.

    Bernetti & Bussi, J. Chem. Phys. 153, 114107 (2020), and for flexible cells Del Tatto, Raiteri, Bernetti & Bussi,
    Appl. Sci. 12, 1139 (2022). With ε the logarithmic strain, applied to cell, positions and (inversely) momenta,

        dε = D/(k_B T) [Σ p⊗p/m - V σ - P V] dt + sqrt(2 D) dW,    D = β k_B T/(3 V τ),

    which leaves V^(N-2) exp[-(U + P V)/(k_B T)] d^9h invariant, whatever β and τ: the isobaric distribution, in which the
    volume has the weight V^N exp[-(U + P V)/(k_B T)] dV. Where the centre of mass rests k_B T stands for its part of p⊗p/m,
    which leaves that distribution as it is; it rests in the cell and moves with it. dW is a symmetric matrix of unit
    variance in each orthonormal direction, so that the cell is not rotated; unless `flexible`, only the trace of ε is kept.

    Parameters
    ----------
    timestep : float
        In ASE time units.
    friction : float
        Of the Langevin thermostat, in inverse ASE time units.
    relaxation_time : float
        Relaxation time τ of the volume in ASE time units.
    fix_com : bool
        The centre of mass rests.
    compressibility : float
        Estimate of the isothermal compressibility β in Å³/eV; only the speed of relaxation depends on it.
    flexible : bool
        All six components of the strain move, else the cell keeps its shape.
    """

    relaxation_time: float = 1000.0 * units.fs
    compressibility: float = 4.5e-5 / units.bar
    flexible: bool = False
    needs_stress: ClassVar[bool] = True

    def check(self, state: MDState) -> None:
        super().check(state)
        batch = state.batch
        if not bool((batch.pbc.all(dim=1) & (torch.linalg.det(batch.cells) != 0)).all()):
            raise ValueError("constant pressure needs systems that are periodic in all three directions")
        if not bool(state.mobile.all()):
            raise ValueError("atoms are held by FixAtoms: a changing cell would move them; use constant volume")
        if state.stress is None:
            raise ValueError("constant pressure needs the stress at the start: PotentialForces(potential, stress=True)")

    def heat_bath(self, state: MDState, dt: float, noise: Tensor | None = None) -> MDState:
        # In the middle of the step: forces and stress are worked out again after it, at no extra cost.
        return self.rescale(super().heat_bath(state, dt, noise), dt)

    def rescale(self, state: MDState, dt: float) -> MDState:
        """Strain each replica by ε over dt, in ASE time units; momenta shrink as positions stretch."""
        batch = state.batch
        stretch = torch.matrix_exp(self._strain(state, dt))
        shrink = torch.linalg.inv_ex(stretch).inverse
        positions = torch.einsum("nx,nxy->ny", batch.positions, stretch[batch.system])
        momenta = torch.einsum("nx,nxy->ny", state.momenta, shrink[batch.system])
        return state.replace(batch=batch.replace(positions=positions, cells=batch.cells @ stretch), momenta=momenta)

    def _strain(self, state: MDState, dt: float) -> Tensor:
        """ε of one step, shape (n_systems, 3, 3), symmetric."""
        batch, p = state.batch, state.momenta
        volume = torch.linalg.det(batch.cells).abs()
        kT = units.kB * state.temperature
        diffusion = self.compressibility * kT / (3.0 * volume * self.relaxation_time)
        kinetic = batch.sum_over_atoms(p[:, :, None] * p[:, None, :] / batch.masses[:, None, None])
        resting = kT if self.fix_com else 0.0
        outside = (state.pressure * volume - resting)[:, None, None] * torch.eye(3).to(kinetic)
        work = kinetic - volume[:, None, None] * state.stress - outside
        noise = system_normals(state.key, state.step, CELL).to(work)
        strain = (dt * diffusion / kT)[:, None, None] * work + (2.0 * dt * diffusion).sqrt()[:, None, None] * noise
        if self.flexible:
            return 0.5 * (strain + strain.mT)
        return strain.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(3).to(strain)
