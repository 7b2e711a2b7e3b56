"""Learn a force constant from the width of a distribution: the Boltzmann estimator on the smallest possible problem.

Atoms sit in harmonic wells U = k r²/2 with the wrong k. The reference is the mean square displacement at the right k,
⟨x²⟩ = k_B T / k. Each round simulates, forms the gradient of the loss from the samples - no backpropagation through the
dynamics - and reuses the samples, reweighted, while their effective number holds.

Both laws of the problem are held against what comes out, within five standard errors: the first gradient of each round
is that of ∂⟨x²⟩/∂k = -k_B T / k², and k ends at its right value.
"""

import argparse
import sys

import torch
from ase import Atoms, units

from stabie_ase import (
    AtomsBatch,
    Estimator,
    Langevin,
    Observable,
    PotentialForces,
    Recorder,
    Samples,
    StatePoint,
    Target,
    accumulate_gradient,
    initial_state,
    simulate,
)
from stabie_ase.observables import Axis
from stabie_ase.potentials.analytic import Harmonic
from stabie_ase.potentials.energies import potential_energies

TEMPERATURE, TRUE_K = 300.0, 2.0
ATOMS, REPLICAS, FRAMES = 10, 64, 10


class MeanSquareDisplacement(Observable):
    """x² averaged over the coordinates of each system, one component."""

    name, label, axis = "displacement", "x² (Å²)", Axis.of_names("", ["x²"])

    def values(self, batch: AtomsBatch) -> torch.Tensor:
        """Shape (n_systems, 1), in Å²."""
        return batch.sum_over_atoms(batch.positions.square().mean(dim=1))[:, None] / batch.counts[:, None]


def standard_errors() -> tuple[float, float]:
    """Relative ones, of k from ⟨x²⟩ and of the gradient, both of one round.

    A squared normal number has twice its squared mean for a variance. The gradient goes by the variance of samples that are
    means over n coordinates, whose excess kurtosis is 12/n. Reuse leaves half of the samples at least.
    """
    n, samples = 3 * ATOMS, REPLICAS * FRAMES
    return (2 / (0.5 * n * samples)) ** 0.5, ((2 + 12 / n) / samples) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 4 if parser.parse_args().quick else 12

    potential = Harmonic(k=1.0)
    # Only the sign of a gradient counts here, and steps shrink where it changes: no speed is carried past the right k.
    optimizer = torch.optim.Rprop(potential.parameters(), lr=0.1)
    observable, estimator = MeanSquareDisplacement(), Estimator(StatePoint(TEMPERATURE))
    targets = [Target(observable, torch.tensor([units.kB * TEMPERATURE / TRUE_K]).double())]
    batch = AtomsBatch.from_atoms([Atoms(f"Ar{ATOMS}", positions=torch.zeros(ATOMS, 3).numpy())] * REPLICAS)
    integrator = Langevin(timestep=5 * units.fs, friction=0.02 / units.fs)
    forces = PotentialForces(potential)
    state = initial_state(batch, forces, TEMPERATURE, fix_com=False)
    k_error, gradient_error = standard_errors()

    print(f"round     k  reuses  loss (Å⁴)  gradient/exact      (right k: {TRUE_K} eV/Å²)")
    for round_ in range(rounds):
        state = simulate(state, integrator, forces, 200)
        recorder = Recorder(state, 100 * FRAMES, every=100)
        state = simulate(state, integrator, forces, 100 * FRAMES, [recorder])
        samples, reuses = Samples.from_trajectory(recorder.trajectory, [observable]), 0
        result = estimator(samples, targets)
        first_loss, k = result.loss, float(potential.k.detach())
        exact = 2 * float(result.means["displacement"] - targets[0].value) * -units.kB * TEMPERATURE / k**2
        while reuses < 5 and result.effective_samples > 0.5 * len(samples):
            optimizer.zero_grad()
            accumulate_gradient(potential, samples.frames, result.weights, chunk_size=1000)
            if reuses == 0:
                ratio = float(potential.k.grad) / exact
            optimizer.step()
            change = potential_energies(potential, samples.frames, chunk_size=1000) - samples.energies
            result = estimator(samples, targets, energy_change=change)
            reuses += 1
        print(f"{round_:5d} {float(potential.k.detach()):5.2f} {reuses:7d}  {first_loss:.2e}   {ratio:14.2f}")
        if abs(ratio - 1) > 5 * gradient_error:
            sys.exit(f"the gradient is {ratio:.3g} times the exact one, expected 1 within {5 * gradient_error:.2f}")
    k = float(potential.k.detach())
    if abs(k / TRUE_K - 1) > 5 * k_error:
        sys.exit(f"k ended at {k:.2f} eV/Å², expected {TRUE_K} within {5 * k_error * TRUE_K:.2f}")


if __name__ == "__main__":
    main()
