"""Learn a force constant from the width of a distribution: the Boltzmann estimator on the smallest possible problem.

Atoms sit in harmonic wells U = k r²/2 with the wrong k. The reference is the mean square displacement at the right k,
⟨x²⟩ = k_B T / k. Each round simulates, forms the gradient of the loss from the samples - no backpropagation through the
dynamics - and reuses the samples, reweighted, while their effective number holds.
"""

import argparse

import torch
from ase import Atoms, units

from stabie_ase import AtomsBatch, Langevin, PotentialForces, accumulate_gradient, estimate, initial_state, simulate
from stabie_ase.boltzmann import potential_energies
from stabie_ase.potentials.analytic import Harmonic

TEMPERATURE, TRUE_K = 300.0, 2.0


def mean_square_displacement(batch: AtomsBatch) -> torch.Tensor:
    """⟨x²⟩ over the coordinates of each system, shape (n_systems, 1), in Å²."""
    return batch.sum_over_atoms(batch.positions.square().mean(dim=1))[:, None] / batch.counts[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 3 if parser.parse_args().quick else 12

    potential = Harmonic(k=1.0)
    optimizer = torch.optim.Adam(potential.parameters(), lr=0.1)
    reference, weights = torch.tensor([units.kB * TEMPERATURE / TRUE_K]), torch.ones(1)
    batch = AtomsBatch.from_atoms([Atoms("Ar10", positions=torch.zeros(10, 3).numpy())] * 64)
    integrator = Langevin(timestep=5 * units.fs, friction=0.02 / units.fs)
    state = initial_state(batch, PotentialForces(potential), TEMPERATURE, fix_com=False)

    print(f"round     k  reuses  loss (Å⁴)      (right k: {TRUE_K} eV/Å²)")
    for round_ in range(rounds):
        state, _, _ = simulate(state, integrator, potential, 200)
        state, trajectory, _ = simulate(state, integrator, potential, 1000, sample_every=100)
        samples, frame, replica = trajectory.frames()
        sampled_energies, values, reuses = trajectory.potential_energy[frame, replica], mean_square_displacement(samples), 0
        result = estimate(values, reference, weights, TEMPERATURE)
        first_loss = float(result.loss)
        while reuses < 5 and result.effective_samples > 0.5 * len(values):
            optimizer.zero_grad()
            accumulate_gradient(potential, samples, result.sample_weights, chunk_size=1000)
            optimizer.step()
            change = potential_energies(potential, samples, chunk_size=1000) - sampled_energies
            result = estimate(values, reference, weights, TEMPERATURE, energy_change=change)
            reuses += 1
        print(f"{round_:5d} {float(potential.k.detach()):5.2f} {reuses:7d}  {first_loss:.2e}")


if __name__ == "__main__":
    main()
