"""The derivative of a correlation in time from paths (experimental), and how noisy it is.

Atoms in harmonic wells, U = k r²/2, move by Langevin dynamics. Their velocity autocorrelation and mean squared displacement after
some lag depend on k, which no mean over the Boltzmann distribution tells: the path gradient is the covariance with the score of each
path's noise. BAOAB steps of a linear force are a linear map, so that the exact answer at this very timestep is known.

All derivatives are held against it, within five standard errors. The tables show what they cost: signal to noise is the exact
derivative over the standard deviation that one path leaves, so that n paths give it to a fraction 1 / (signal to noise √n).
"""

import argparse
import math
import sys

import torch
from ase import Atoms, units
from ase.data import atomic_masses, atomic_numbers

from stabie_ase import AtomsBatch, Langevin, PotentialForces, initial_state
from stabie_ase.boltzmann.path import Paths, SquaredDisplacement, VelocityAutocorrelation, accumulate_path_gradient, path_estimate
from stabie_ase.potentials.analytic import Harmonic

TEMPERATURE, K, MASS = 300.0, 1.0, float(atomic_masses[atomic_numbers["Ar"]])
TIMESTEP, FRICTION = 12 * units.fs, 0.005 / units.fs
KT = units.kB * TEMPERATURE
LAGS, BLOCKS = (6, 12, 25, 42, 76), 32
KINDS = {"velocity autocorrelation, (Å / ASE time)²": VelocityAutocorrelation, "mean squared displacement, Å²": SquaredDisplacement}


def exact(k: torch.Tensor, lag: int) -> torch.Tensor:
    """Velocity autocorrelation and mean squared displacement of three coordinates, shape (2,).

    (x, p) goes by a linear map and noise in each step; at the start it is Boltzmann distributed at this k.
    """
    decay, zero, one = math.exp(-FRICTION * TIMESTEP), torch.zeros_like(k), torch.ones_like(k)
    kick = torch.stack([one, zero, -k * TIMESTEP / 2, one]).view(2, 2)
    drift = torch.stack([one, one * TIMESTEP / (2 * MASS), zero, one]).view(2, 2)
    step = kick @ drift @ torch.diag(torch.stack([one, decay * one])) @ drift @ kick
    noise = kick @ drift @ torch.stack([zero, one * math.sqrt((1 - decay**2) * MASS * KT)])
    start = torch.diag(torch.stack([KT / k, one * MASS * KT]))
    now, later = start, start
    for _ in range(lag):
        now, later = step @ now @ step.T + torch.outer(noise, noise), step @ later
    return 3 * torch.stack([later[1, 1] / MASS**2, now[0, 0] + start[0, 0] - 2 * later[0, 0]])


def record(n: int, n_steps: int) -> Paths:
    """Paths of n atoms, one a replica, from exact samples of their wells."""
    positions = math.sqrt(KT / K) * torch.randn((n, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = AtomsBatch.from_atoms(Atoms("Ar")).repeat(n).replace(positions=positions)
    forces = PotentialForces(Harmonic(K))
    state = initial_state(batch, forces, TEMPERATURE, fix_com=False)
    return Paths.record(state, Langevin(TIMESTEP, FRICTION), forces, n_steps)[0]


def derivative(paths: Paths, observable, component: int) -> tuple[float, float]:
    """∂/∂k of a component's mean and its standard error, from as many estimates as there are blocks of paths."""
    potential, found = Harmonic(K), []
    for block in torch.arange(paths.start.n_systems).split(paths.start.n_systems // BLOCKS):
        part = paths.select(block)
        potential.zero_grad()
        accumulate_path_gradient(potential, part, path_estimate(part, observable, lambda mean: mean[component]), chunk_size=10000)
        found.append(float(potential.k.grad))
    return float(torch.tensor(found).mean()), float(torch.tensor(found).std()) / math.sqrt(len(found))


def check(what: str, found: float, error: float, expected: float) -> None:
    if abs(found - expected) > 5 * error:
        sys.exit(f"{what}: the derivative is {found:.3g} ± {error:.1g}, expected {expected:.3g}")


def table(paths: Paths, name: str, kind, answers: torch.Tensor, numbers: list[int]) -> None:
    """One line a lag: the derivative from ever more paths, and the exact one."""
    print(f"\n∂/∂k of the {name}\n lag  periods      exact " + "".join(f"{f'{n} paths':>23s}" for n in numbers) + "  signal/noise")
    period = 2 * math.pi * math.sqrt(MASS / K) / TIMESTEP
    for j, (lag, expected) in enumerate(zip(LAGS, answers.tolist())):
        line = f"{lag:4d} {lag / period:8.2f} {expected:10.2e} "
        for n in numbers:
            found, error = derivative(paths.select(torch.arange(n)), kind(LAGS), j)
            check(f"{name}, lag {lag}, {n} paths", found, error, expected)
            line += f"{found:12.2e} ± {error:.1e} "
        print(line + f"{abs(expected) / (error * math.sqrt(n)):12.3f}")


def longer_windows(paths: Paths, expected: float) -> None:
    """What noise after the last look would add, if its scores were not left out."""
    print(f"\nvelocity autocorrelation at lag {LAGS[1]}, scores of later noise kept\nwindow  signal/noise")
    for window in (LAGS[1], 2 * LAGS[1], *LAGS[3:]):
        observable = type("Windowed", (VelocityAutocorrelation,), {"last_steps": torch.tensor([window])})((LAGS[1],))
        found, error = derivative(paths, observable, 0)
        check(f"window of {window} steps", found, error, expected)
        print(f"{window:6d} {abs(expected) / (error * math.sqrt(paths.start.n_systems)):13.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer paths")
    numbers = [256, 1024] if parser.parse_args().quick else [1024, 4096, 16384]
    paths = record(max(numbers), max(LAGS))
    k = torch.tensor(K, dtype=torch.float64)
    answers = torch.stack([torch.autograd.functional.jacobian(lambda k: exact(k, lag), k) for lag in LAGS])
    for column, (name, kind) in enumerate(KINDS.items()):
        table(paths, name, kind, answers[:, column], numbers)
    longer_windows(paths, float(answers[1, 0]))


if __name__ == "__main__":
    main()
