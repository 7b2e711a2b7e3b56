"""The one backward pass of the estimator: a weighted sum of energies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stabie_ase.boltzmann.estimate import Estimate
from stabie_ase.boltzmann.samples import Samples
from stabie_ase.observables import Observable
from stabie_ase.observables.energetics import Energetics
from stabie_ase.potentials.base import Potential
from stabie_ase.potentials.energies import potential_energies
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.conformers import Conformers
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.topology import Groups


def accumulate_gradient(
    potential: Potential,
    frames: AtomsBatch,
    weights: Tensor,
    groups: Groups | None = None,
    chunk_size: int | None = None,
    conformers: Conformers | None = None,
) -> Tensor:
    """Add ∇_θ Σ_j w_j U_θ(γ_j) to the parameters' `.grad`, chunk by chunk; returns U_θ of every frame.

    Memory is that of one chunk, whatever the number of samples, and the observable does not occur in it. With groups of
    atoms U_θ(γ_j) is the sum of the per-atom energies of the group's atoms, and each atom a counts by W_a = Σ_{j∋a} w_j; with
    conformers as well it is what `group_energies` says.

    Parameters
    ----------
    potential : Potential
        With per-atom energies where groups are given.
    frames : AtomsBatch
    weights : Tensor, shape (n_systems,) or (n_groups,)
    groups : Groups, optional
        Each frame is one if none are given.
    chunk_size : int, optional
        Frames in one backward pass, see `AtomsBatch.chunks`.
    conformers : Conformers, optional
        Of the molecules that the groups are.

    Returns
    -------
    Tensor of float64, shape (n_systems,), in eV

    Raises
    ------
    PropertyNotImplementedError
        Groups, and a potential without per-atom energies.
    """
    if groups is not None and conformers is not None:
        accumulate_gradient(potential, conformers.at_rest(frames, groups), -weights, chunk_size=chunk_size)
        weights, groups = weights.new_zeros(frames.n_systems).index_add(0, groups.system, weights), None
    energies, parameters = [], [p for p in potential.parameters() if p.requires_grad]
    of_atoms = None if groups is None else groups.spread(weights.double(), frames)
    for systems in frames.chunks(chunk_size):
        part = frames.select(systems)
        neighbors = neighbor_list(part, potential.cutoff)
        if of_atoms is None:
            energy = potential(part, neighbors)
            weighted = (weights[systems] * energy).sum()
        else:
            atomic = potential(part, neighbors, of_atoms=True)
            energy = part.sum_over_atoms(atomic)
            weighted = (of_atoms[frames.atom_index(systems)] * atomic).sum()
        # Some families ask for position gradients whenever they are called; here they would only cost time.
        weighted.backward(inputs=parameters)
        energies.append(energy.detach())
    return torch.cat(energies)


def accumulate_stress_gradient(potential: Potential, frames: AtomsBatch, weights: Tensor, chunk_size: int | None = None) -> None:
    """Add ∇_θ Σ_i s_i·σ_θ(Γ_i) to the parameters' `.grad`, chunk by chunk, by a second derivative of the energy.

    Parameters
    ----------
    potential : Potential
    frames : AtomsBatch
    weights : Tensor, shape (n_systems, 3, 3)
        s.
    chunk_size : int, optional
        Frames in one backward pass, see `AtomsBatch.chunks`.

    Raises
    ------
    PropertyNotImplementedError
        Stress where it is not defined.
    """
    parameters = [p for p in potential.parameters() if p.requires_grad]
    for systems in frames.chunks(chunk_size):
        part = frames.select(systems)
        stress = potential.compute(part, neighbor_list(part, potential.cutoff), stress=True, create_graph=True).stress
        assert stress is not None
        (weights[systems] * stress.double()).sum().backward(inputs=parameters)


def accumulate(potential: Potential, estimate: Estimate) -> None:
    """Add the gradient of an estimate's losses to the parameters' `.grad`, in units of the loss per unit of each parameter."""
    samples = estimate.samples
    accumulate_gradient(potential, samples.frames, estimate.weights, samples.parts, conformers=samples.conformers)
    if estimate.stress_weights is not None:
        accumulate_stress_gradient(potential, samples.frames, estimate.stress_weights)


def of_present(potential: Potential, samples: Samples, observables: Sequence[Observable]) -> Samples:
    """Samples whose values of observables that contain θ are those by the potential as it is now."""
    made = [observable for observable in observables if observable.needs]
    known = samples.energetics
    if not made or known is None:
        return samples
    now = Energetics.by(potential, samples.frames, stress=known.stress is not None)
    # What averages along trajectories have made of values stays in them.
    change = {o.name: o.sample(samples.frames, None, now) - o.sample(samples.frames, None, known) for o in made}
    values = {name: x + change.get(name, 0.0) for name, x in samples.values.items()}
    return replace(samples, values=values, energetics=now)


def group_energies(
    potential: Potential, frames: AtomsBatch, groups: Groups, chunk_size: int | None = None, conformers: Conformers | None = None
) -> Tensor:
    """U_θ(γ_j) of every group without a graph, float64, shape (n_groups,), in eV; see `accumulate_gradient`.

    With conformers of the molecules that groups are it is conditional: the energy of the frame, less that of the same frame with the
    molecule put into a sound conformation. exp(-β U) is then the probability of the conformation in its surroundings, up to a factor that
    these alone set. No force depends on how a potential parts its energy among atoms, and a step for a sum of some of them may move it
    from one to another and nothing else; this difference is of energies of whole systems.
    """
    if conformers is not None:
        alone = potential_energies(potential, conformers.at_rest(frames, groups), chunk_size)
        return potential_energies(potential, frames, chunk_size)[groups.system] - alone
    parts = []
    with torch.no_grad():
        for systems in frames.chunks(chunk_size):
            part = frames.select(systems)
            parts.append(potential(part, neighbor_list(part, potential.cutoff), of_atoms=True))
    atomic = torch.cat(parts)
    return atomic.new_zeros(groups.n_groups).index_add(0, groups.group, atomic[groups.atoms])


def with_group_energies(potential: Potential, samples: Samples) -> Samples:
    """Samples with the energies of their groups by the potential that drove them, as it is now; whole frames have theirs already."""
    if samples.parts is None or samples.group_energies is not None:
        return samples
    return replace(samples, group_energies=_of_groups(potential, samples))


def energies_of(potential: Potential, samples: Samples) -> Tensor:
    """U_θ of every group without a graph, float64, shape (n_groups,), in eV."""
    if samples.parts is None:
        return potential_energies(potential, samples.frames)
    return _of_groups(potential, samples)


def _of_groups(potential: Potential, samples: Samples) -> Tensor:
    return group_energies(potential, samples.frames, samples.groups, conformers=samples.conformers)


def energy_change(potential: Potential, samples: Samples) -> Tensor:
    """U_θ - U_θ0 of every group without a graph, float64, shape (n_groups,), in eV; see `with_group_energies`."""
    known = samples.energies if samples.parts is None else samples.group_energies
    if known is None:
        raise ValueError("the energies of groups of atoms by the potential that drove them are not known: with_group_energies gives them")
    return energies_of(potential, samples) - known
