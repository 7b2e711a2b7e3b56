"""What every potential has to obey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch.utils._python_dispatch import TorchDispatchMode

from stabie_ase.potentials.base import NO_STRESS, Potential, has_stress
from stabie_ase.potentials.checkpoint import load_potential, save_potential
from stabie_ase.potentials.family import family_of
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list

DIFFERENCE_STEP = 1e-4
"""Å, or of a strain, of central differences: their error is about STEP² times a third derivative."""


def check_potential(
    potential: Potential, frames: Sequence[Atoms], tolerance: float | None = None, folder: str | Path | None = None
) -> None:
    """Hold a potential against physics and against the contract.

    Energies and forces are finite; forces are the negative gradient of the energy, by central differences along random directions,
    and stress its derivative in a strain; energies do not change by translation, rotation or the order of atoms, nor with the
    other systems of a batch; pairs of a longer list contribute nothing; per-atom energies sum to the energy; `evaluate` is a function
    of its inputs alone, gives the energy, and has no shape that depends on a value; parameters have gradients; an unknown element is
    refused; a file of its family gives the same potential back.

    Parameters
    ----------
    potential : Potential
    frames : sequence of Atoms
        That it knows the elements of, two at least, for periodic potentials some of them periodic.
    tolerance : float, optional
        Of energies in eV and forces in eV/Å; by default 1e-6 of the largest energy difference or force in float64, 1e-3 in float32.
    folder : path, optional
        Where a checkpoint may be written; without it that is left out.

    Raises
    ------
    AssertionError
        In a sentence, what was expected and what was found.
    """
    batch = AtomsBatch.from_atoms(frames, device=potential.device)
    prediction = _computed(potential, batch)
    assert torch.isfinite(prediction.energies).all(), f"energies are not finite: {prediction.energies.tolist()}"
    assert torch.isfinite(prediction.forces).all(), "forces are not finite"
    if tolerance is None:
        scale = max(float(prediction.forces.abs().max()), 1e-3)
        tolerance = scale * (1e-6 if potential.dtype == torch.float64 else 1e-3)
    _forces(potential, batch, tolerance)
    _stress(potential, batch, tolerance)
    _symmetries(potential, frames, tolerance)
    _batches(potential, batch, tolerance)
    _lists(potential, batch, tolerance)
    _per_atom(potential, batch, tolerance)
    _inputs(potential, batch, tolerance)
    _parameters(potential, batch)
    _elements(potential, batch)
    if folder is not None and family_of(potential) is not None:
        _files(potential, batch, Path(folder))


def _computed(potential, batch, stress=False):
    return potential.compute(batch, neighbor_list(batch, potential.cutoff), stress=stress)


def _energies(potential, batch):
    with torch.no_grad():
        return potential(batch, neighbor_list(batch, potential.cutoff))


def _close(found, expected, tolerance, what):
    worst = float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0
    assert worst <= tolerance, f"{what}: off by {worst:.3g}, expected {tolerance:.3g} at most"


def _forces(potential, batch, tolerance):
    generator = torch.Generator().manual_seed(0)
    forces = _computed(potential, batch).forces.double()
    # Differences of energies of many electronvolts have their round-off.
    rounding = 1e-7 if potential.dtype == torch.float64 else 2.0
    for _ in range(3):
        direction = torch.randn(batch.positions.shape, generator=generator, dtype=torch.float64).to(batch.device)
        direction = direction / direction.norm()
        up, down = (_energies(potential, batch.replace(positions=batch.positions + s * DIFFERENCE_STEP * direction)) for s in (1, -1))
        slopes = (up - down).double() / (2 * DIFFERENCE_STEP)
        expected = -batch.sum_over_atoms((forces * direction).sum(dim=1))
        _close(slopes, expected, 30 * tolerance + rounding * 1e-1, "forces are not the negative gradient of the energy")


def _stress(potential, batch, tolerance):
    periodic = has_stress(batch).nonzero()[:, 0]
    if not len(periodic):
        return
    batch = batch.select(periodic)
    try:
        stress = _computed(potential, batch, stress=True).stress.double()
    except NotImplementedError as error:
        assert str(error) != NO_STRESS, "the stress of periodic systems is refused as if they were not"
        return
    volume = torch.linalg.det(batch.cells.double()).abs()
    strain = torch.tensor([[1.0, 0.4, -0.3], [0.4, -0.7, 0.2], [-0.3, 0.2, 0.5]], dtype=torch.float64, device=batch.device)
    energies = []
    for sign in (1, -1):
        stretch = torch.eye(3, dtype=torch.float64, device=batch.device) + sign * DIFFERENCE_STEP * strain
        energies.append(_energies(potential, batch.replace(positions=batch.positions @ stretch, cells=batch.cells @ stretch)))
    slopes = (energies[0] - energies[1]).double() / (2 * DIFFERENCE_STEP)
    rounding = 1e-6 if potential.dtype == torch.float64 else 5.0
    _close(slopes, volume * (stress * strain).sum(dim=(1, 2)), 1e3 * tolerance + rounding, "stress is not the strain derivative")


def _symmetries(potential, frames, tolerance):
    rng = np.random.default_rng(0)
    expected = _energies(potential, AtomsBatch.from_atoms(frames, device=potential.device))
    changes = {
        "a translation": lambda atoms: atoms.translate([0.3, -1.2, 7.7]),
        "a rotation": lambda atoms: atoms.rotate(77.0, (1.0, 2.0, -0.5), rotate_cell=True),
    }
    for what, change in changes.items():
        moved = [atoms.copy() for atoms in frames]
        for atoms in moved:
            change(atoms)
        found = _energies(potential, AtomsBatch.from_atoms(moved, device=potential.device))
        _close(found, expected, 30 * tolerance, f"energies change with {what}")
    shuffled = [atoms[rng.permutation(len(atoms))] for atoms in frames]
    found = _energies(potential, AtomsBatch.from_atoms(shuffled, device=potential.device))
    _close(found, expected, 30 * tolerance, "energies change with the order of the atoms")


def _batches(potential, batch, tolerance):
    together = _computed(potential, batch)
    for k in range(batch.n_systems):
        alone = _computed(potential, batch.select([k]))
        _close(alone.energies, together.energies[[k]], 30 * tolerance, f"the energy of system {k} depends on the others in its batch")
        atoms = batch.atom_index(torch.tensor([k], device=batch.device))
        _close(alone.forces, together.forces[atoms], 30 * tolerance, f"forces of system {k} depend on the others in its batch")


def _lists(potential, batch, tolerance):
    if not np.isfinite(potential.cutoff):
        return
    # Of a small molecule any list holds all pairs, unless it is trimmed.
    lists = neighbor_list(batch, potential.cutoff + 1.0), neighbor_list(batch, potential.cutoff).within(batch, potential.cutoff)
    with torch.no_grad():
        longer, exact = (potential(batch, neighbors) for neighbors in lists)
    _close(longer, exact, 30 * tolerance, "pairs beyond the cutoff contribute")


def _per_atom(potential, batch, tolerance):
    if not potential.gives_atomic_energies:
        return
    with torch.no_grad():
        atomic = potential.atomic_energies(batch.to(dtype=potential.dtype), neighbor_list(batch, potential.cutoff))
    assert atomic.shape == (batch.n_atoms,), f"per-atom energies have the shape {tuple(atomic.shape)}, expected ({batch.n_atoms},)"
    _close(batch.sum_over_atoms(atomic.double()), _energies(potential, batch), 30 * tolerance, "per-atom energies do not sum to the energy")


def _inputs(potential, batch, tolerance):
    if not _is_evaluated(potential):
        return
    cast, other = (x.to(dtype=potential.dtype) for x in (batch, batch.replace(positions=0.97 * batch.positions)))
    with torch.no_grad():
        inputs = potential.inputs(cast, neighbor_list(cast, potential.cutoff))
        bad = [name for name, x in inputs.items() if not isinstance(x, torch.Tensor)]
        assert not bad, f"inputs hold what is no tensor: {', '.join(bad)}"
        before = {name: x.clone() for name, x in inputs.items()}
        potential.inputs(other, neighbor_list(other, potential.cutoff))  # may leave nothing behind in the potential
        with _Shapes() as shapes:
            energies = potential.evaluate(inputs)
        again = potential.evaluate(before)
    assert not shapes.found, f"shapes in evaluate depend on values: {', '.join(sorted(shapes.found))}"
    expected = (batch.n_atoms,) if potential.evaluates_atoms else (batch.n_systems,)
    assert energies.shape == expected, f"evaluate gives the shape {tuple(energies.shape)}, expected {expected}"
    _close(again, energies, 30 * tolerance, "evaluate gives other energies of the same inputs")
    summed = batch.sum_over_atoms(energies.double()) if potential.evaluates_atoms else energies
    _close(summed, _energies(potential, batch), 30 * tolerance, "evaluate depends on more than its inputs, or is not the energy")


def _is_evaluated(potential):
    """Whether its energies are those of `evaluate`, with nothing added."""
    kind = type(potential)
    own = kind.energies is not Potential.energies or kind.atomic_energies is not Potential.atomic_energies
    return kind.evaluate is not Potential.evaluate and not own


class _Shapes(TorchDispatchMode):
    """Notes operations whose result has a shape that depends on a value, or that read a value: no graph can be made of them."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tagged = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags)
        if tagged and (name != "index" or any(x is not None and x.dtype == torch.bool for x in args[1])):
            self.found.add("indexing by a mask" if name == "index" else name)
        return func(*args, **(kwargs or {}))


def _parameters(potential, batch):
    parameters = [p for p in potential.parameters() if p.requires_grad]
    if not parameters:
        return
    energy = potential(batch, neighbor_list(batch, potential.cutoff)).sum()
    gradients = torch.autograd.grad(energy, parameters, allow_unused=True)
    assert any(g is not None and bool(torch.isfinite(g).all()) for g in gradients), "the energy has no gradient in any parameter"


def _elements(potential, batch):
    if potential.numbers is None:
        return
    unknown = next(z for z in range(1, len(chemical_symbols)) if z not in potential.numbers)
    strange = batch.replace(numbers=torch.full_like(batch.numbers, unknown))
    try:
        _energies(potential, strange)
    except ValueError:
        return
    raise AssertionError(f"{chemical_symbols[unknown]}, which the model does not know, is not refused")


def _files(potential, batch, folder):
    path = folder / f"checked{family_of(potential).suffix}"
    save_potential(potential, path)
    again = load_potential(path, device=potential.device)
    assert again.family == potential.family, f"the file of a {potential.family} opens as a {again.family}"
    assert torch.equal(_energies(again, batch), _energies(potential, batch)), "a saved potential has other energies when it is opened"
