"""Each estimator against an exact answer: the derivative of a loss at three numbers of samples, beside what it is.

    python examples/exact_answers.py                                      # closed forms and quadrature, minutes
    python examples/exact_answers.py --model model.pt --ref frames.xyz    # a molecule, against finite differences of long dynamics
    python examples/exact_answers.py --quick

Atoms sit in wells U = k r²/2, are bound to one another by such springs, or fill a box under pressure in a background that attracts
all alike, U = -k N²/V; k is the one parameter and is varied in its logarithm. Samples are drawn straight from the Boltzmann
distribution, so that all there is to see is the estimator. An answer is the mean over sets of samples, with the standard error of
that, and z is how many of these it is off.

Of a molecule the derivative is that of its mean bond length, along its own gradient in all parameters. The finite differences are of
dynamics at both sides; errors are over replicas.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms, units
from scipy.integrate import simpson

from stabie_ase import (
    AtomsBatch,
    BondLengths,
    Estimator,
    Groups,
    Langevin,
    Observable,
    Potential,
    PotentialForces,
    Samples,
    Setting,
    StatePoint,
    Target,
    criteria_from,
    load_potential,
    read_reference,
    temperature_weights,
    watched,
)
from stabie_ase.boltzmann import accumulate
from stabie_ase.boltzmann.gradient import energy_change, with_group_energies
from stabie_ase.boltzmann.projection import projection
from stabie_ase.dynamics.starts import start
from stabie_ase.observables import Axis, PotentialEnergy
from stabie_ase.observables.energetics import Energetics
from stabie_ase.stability import VERDICT, default_criteria
from stabie_ase.structures.conformers import Conformers
from stabie_ase.structures.topology import Topology

T, ATOMS = 300.0, 6
KT = units.kB * T
WORST = 4.0
"""Standard errors by which no answer may be off: of the thirty or so in the table one in five hundred tables has one beyond it."""


class Wells(Potential):
    """U = Σ_a (½ k r_a² + q k x_a⁴)."""

    family, cutoff = "wells", 1.0

    def __init__(self, q=0.0):
        super().__init__()
        self.log_k, self.q = torch.nn.Parameter(torch.tensor(math.log(0.7)).double()), q

    def inputs(self, batch, neighbors):
        """What `evaluate` needs."""
        return {"positions": batch.positions}

    def evaluate(self, inputs):
        """Of each atom, in eV."""
        x = inputs["positions"]
        return self.log_k.exp() * (0.5 * x.square().sum(dim=1) + self.q * x[:, 0] ** 4)


class Springs(Potential):
    """U = Σ_m ½ k (d_m - 1 Å)² of molecules of two atoms, told as energies of the atoms of the next molecule."""

    family, cutoff = "springs", 1.0

    def __init__(self):
        super().__init__()
        self.log_k = torch.nn.Parameter(torch.tensor(math.log(20.0)).double())

    def inputs(self, batch, neighbors):
        """What `evaluate` needs."""
        return {"positions": batch.positions}

    def evaluate(self, inputs):
        """Of each atom, in eV."""
        energies = 0.25 * self.log_k.exp() * (lengths_of(inputs["positions"]) - 1.0).square()
        return energies.view(-1, ATOMS // 2).roll(1, dims=1).reshape(-1).repeat_interleave(2)


class Background(Potential):
    """U = -k N²/V, with k in eV Å³."""

    family, cutoff, evaluates_atoms = "background", 1.0, False

    def __init__(self):
        super().__init__()
        self.log_k = torch.nn.Parameter(torch.tensor(math.log(0.5)).double())

    def inputs(self, batch, neighbors):
        """What `evaluate` needs."""
        return {"cells": batch.cells, "counts": batch.counts}

    def evaluate(self, inputs):
        """Of each system, in eV."""
        return -self.log_k.exp() * inputs["counts"].double() ** 2 / torch.linalg.det(inputs["cells"]).abs()


def lengths_of(positions):
    """Of the bonds of molecules of two atoms."""
    ends = positions.view(-1, 2, 3)
    return (ends[:, 1] - ends[:, 0]).norm(dim=1)


class Of(Observable):
    """Mean over a system's atoms, over the bonds of a molecule, or its volume, of a function."""

    axis = Axis.of_names("", [""])

    def __init__(self, name, function):
        self.name, self.label, self.function = name, name, function

    def values(self, batch):
        """Shape (n_systems, 1)."""
        return self.function(batch)[:, None]


def mean_of(function):
    return lambda batch: batch.sum_over_atoms(function(batch.positions[:, 0])) / batch.counts


X2, ABS = Of("x²", mean_of(torch.square)), Of("|x|", mean_of(torch.abs))
STRETCH = Of("(d - 1)²", lambda batch: (lengths_of(batch.positions) - 1.0).square())
VOLUME = Of("V", lambda batch: torch.linalg.det(batch.cells).abs() / 1000.0)


def wells(n, seed, temperature=T, k=0.7):
    generator = torch.Generator().manual_seed(seed)
    positions = math.sqrt(units.kB * temperature / k) * torch.randn((n * ATOMS, 3), generator=generator, dtype=torch.float64)
    return AtomsBatch.from_atoms(Atoms(f"H{ATOMS}", np.zeros((ATOMS, 3)))).repeat(n).replace(positions=positions)


def springs(n, seed):
    """Molecules in a row, each bond along the row."""
    lengths = drawn(LENGTHS, of_length(0.0), n * ATOMS // 2, seed)
    positions = torch.zeros((n * ATOMS // 2, 2, 3), dtype=torch.float64)
    positions[:, :, 0] = 10.0 * (torch.arange(len(lengths)) % (ATOMS // 2))[:, None]
    positions[:, 1, 0] += lengths
    return AtomsBatch.from_atoms(ROW).repeat(n).replace(positions=positions.view(-1, 3))


def drawn(grid, log_p, n, seed):
    """n numbers with a density on a grid."""
    cumulative = np.exp(log_p - log_p.max()).cumsum()
    return torch.as_tensor(np.interp(np.random.default_rng(seed).random(n), cumulative / cumulative[-1], grid))


def mean_on(grid, log_p, values):
    p = np.exp(log_p - log_p.max())
    return simpson(p * values, x=grid) / simpson(p, x=grid)


def samples_of(potential, frames, observables, groups=None, conformers=None):
    """With energies and values by a potential."""
    groups = groups or Groups.systems(frames)
    index, found = torch.arange(frames.n_systems), Energetics.by(potential, frames)
    values = {o.name: o.sample(frames, groups, found) for o in observables}
    samples = Samples(frames, groups, values, found.energies, 0.0 * index, 0 * index, index, energetics=found, conformers=conformers)
    return with_group_energies(potential, samples)


def loss_gradient(potential, samples, references, temperature=T, cross_fit=True, change=None, some=None):
    """Of Σ (mean - reference)², the references by observable, with respect to ln k."""
    targets = [Target(o, torch.tensor([reference]).double()) for o, reference in references.items()]
    accumulate(potential, Estimator(StatePoint(temperature), cross_fit, drawn=some)(samples, targets, change))
    return float(potential.log_k.grad)


def slope(loss):
    """Of a function of ln k, by central differences."""
    return (loss(1e-4) - loss(-1e-4)) / 2e-4


# -- each case: the answer of one set of n samples, and the exact one


def of_wells(n, seed):
    potential = Wells()
    return loss_gradient(potential, samples_of(potential, wells(n, seed), [X2]), {X2: 0.02})


def several_observables(n, seed):
    potential = Wells()
    return loss_gradient(potential, samples_of(potential, wells(n, seed), [X2, ABS]), {X2: 0.02, ABS: 0.1})


def several_temperatures(n, seed):
    potential = Wells()
    for k, (temperature, reference) in enumerate([(T, 0.02), (2 * T, 0.05)]):
        found = loss_gradient(potential, samples_of(potential, wells(n, 2 * seed + k, temperature), [X2]), {X2: reference}, temperature)
    return found  # each adds to the same parameter


def of_atoms(n, seed):
    potential, frames = Wells(), wells(n, seed)
    groups = Groups(torch.arange(frames.n_atoms), torch.arange(frames.n_atoms), frames.system)
    return loss_gradient(potential, samples_of(potential, frames, [X2], groups), {X2: 0.02})


def of_conformations(n, seed, some=None):
    """Energies of the atoms of a molecule do not tell those of its bond, energies of the system with it at rest do."""
    potential, frames = Springs(), springs(n, seed)
    samples = samples_of(potential, frames, [STRETCH], Groups.molecules(frames, BONDS), CONFORMERS)
    return loss_gradient(potential, samples, {STRETCH: 0.002}, some=some)


def of_some_conformations(n, seed):
    return of_conformations(n, seed, some=128)


def reweighted(n, seed):
    potential = Wells()
    samples = samples_of(potential, wells(n, seed), [X2])
    with torch.no_grad():
        potential.log_k += 0.1
    return loss_gradient(potential, samples, {X2: 0.02}, change=energy_change(potential, samples))


def energy(n, seed):
    potential, x = Wells(q=4.0), drawn(GRID, -energy_of(0.0) / KT, n * ATOMS, seed)
    frames = wells(n, seed)
    frames = frames.replace(positions=torch.cat([x[:, None], frames.positions[:, 1:]], dim=1))
    return loss_gradient(potential, samples_of(potential, frames, [ENERGY]), {ENERGY: 0.03})


def at_pressure(n, seed):
    potential, volumes = Background(), drawn(VOLUMES, of_volume(0.0), n, seed)
    cells = torch.eye(3, dtype=torch.float64) * volumes[:, None, None] ** (1 / 3)
    frames = AtomsBatch.from_atoms(Atoms(f"Ar{N_GAS}", np.zeros((N_GAS, 3)), cell=np.eye(3), pbc=True)).repeat(n).replace(cells=cells)
    return loss_gradient(potential, samples_of(potential, frames, [VOLUME]), {VOLUME: 8.0})


def another_temperature(n, seed):
    """Not a gradient: the mean of frames of 300 K at 330 K."""
    frames = wells(n, seed)
    weights, _ = temperature_weights(Energetics.by(Wells(), frames).energies, T, 1.1 * T)
    return float(weights @ X2(frames)[:, 0])


GRID = np.linspace(-1.5, 1.5, 20_001)
ENERGY = PotentialEnergy()
N_GAS, PRESSURE = 20, 0.02 * units.GPa
VOLUMES = np.linspace(0.1, 4.0, 100_001) * N_GAS * KT / PRESSURE


ROW = Atoms(f"O{ATOMS}", [(10.0 * m + d, 0, 0) for m in range(ATOMS // 2) for d in (0, 1)])
BONDS = Topology.from_frames([ROW])
CONFORMERS = Conformers.of([ROW], BONDS)
LENGTHS = np.linspace(0.4, 1.6, 20_001)


def of_length(change):
    return -10.0 * math.exp(change) * (LENGTHS - 1.0) ** 2 / KT


def energy_of(change, k=0.7):
    return k * math.exp(change) * (0.5 * GRID**2 + 4.0 * GRID**4)


def of_volume(change):
    return N_GAS * np.log(VOLUMES) - (PRESSURE * VOLUMES - 0.5 * math.exp(change) * N_GAS**2 / VOLUMES) / KT


def stretch(change):
    return mean_on(LENGTHS, of_length(change), (LENGTHS - 1.0) ** 2)


def square(change, temperature=T):
    return units.kB * temperature / (0.7 * math.exp(change))


CASES = {
    "one observable": (of_wells, slope(lambda c: (square(c) - 0.02) ** 2)),
    "several observables": (
        several_observables,
        slope(lambda c: (square(c) - 0.02) ** 2 + (math.sqrt(2 * square(c) / math.pi) - 0.1) ** 2),
    ),
    "several temperatures": (several_temperatures, slope(lambda c: (square(c) - 0.02) ** 2 + (square(c, 2 * T) - 0.05) ** 2)),
    "localized, uncoupled atoms": (of_atoms, slope(lambda c: (square(c) - 0.02) ** 2)),
    "conditional, conformations": (of_conformations, slope(lambda c: (stretch(c) - 0.002) ** 2)),
    "conditional, 128 of them": (of_some_conformations, slope(lambda c: (stretch(c) - 0.002) ** 2)),
    "reweighted to another k": (reweighted, slope(lambda c: (square(0.1 + c) - 0.02) ** 2)),
    "energy, which contains k": (energy, slope(lambda c: (mean_on(GRID, -energy_of(c) / KT, energy_of(c)) + KT - 0.03) ** 2)),
    "constant pressure": (at_pressure, slope(lambda c: (mean_on(VOLUMES, of_volume(c), VOLUMES / 1000.0) - 8.0) ** 2)),
    "mean at another temperature": (another_temperature, square(0.0, 1.1 * T)),
}


class Row(NamedTuple):
    """An answer beside the exact one."""

    what: str
    n: int
    sets: int
    found: float
    error: float
    exact: float

    def tell(self) -> None:
        """Print it; stop where it is off."""
        z = (self.found - self.exact) / self.error
        print(f"{self.what:34s} {self.n:7d} {self.sets:6d}  {self.found:11.4e} ± {self.error:.1e}  {self.exact:11.4e} {z:6.1f}", flush=True)
        if abs(z) > WORST:
            sys.exit(f"{self.what}: off by {z:.1f} standard errors")


def repeated(what: str, answer: Callable[[int, int], float], exact: float, n: int, sets: int) -> None:
    found = np.array([answer(n, seed) for seed in range(sets)])
    Row(what, n, sets, float(found.mean()), float(found.std(ddof=1)) / math.sqrt(sets), exact).tell()


def biases(sets: int) -> None:
    """Of few samples: with the residual and the covariance from the same ones, and cross-fitted."""
    exact, n = CASES["one observable"][1], 8
    found = {}
    for cross_fit in (False, True):
        potential, gradients = Wells(), []
        for seed in range(sets):
            potential.zero_grad()
            gradients.append(loss_gradient(potential, samples_of(potential, wells(n, seed), [X2]), {X2: 0.02}, cross_fit=cross_fit))
        found[cross_fit] = np.array(gradients)
    plain = found[False]
    error = plain.std(ddof=1) / math.sqrt(sets)
    bias = f"{plain.mean() / exact - 1:+.2f} ± {abs(error / exact):.2f}"
    print(f"\nof {n} samples, {sets} times: bias of the plain estimate {bias} of the gradient")
    Row("cross-fitted", n, sets, found[True].mean(), found[True].std(ddof=1) / math.sqrt(sets), exact).tell()


# -- a molecule


class MeanBond(Observable):
    """Mean over all bonds of a molecule of their lengths, in Å."""

    name, label, axis = "mean-bond", "r (Å)", Axis.of_names("", ["r"])

    def __init__(self, topology):
        self.lengths = BondLengths(topology)

    def values(self, batch):
        """Shape (n_systems, 1)."""
        return self.lengths(batch).mean(dim=1, keepdim=True)


class Dynamics:
    """Long Langevin dynamics of a molecule by a model; replicas that fail tell nothing."""

    def __init__(self, args):
        self.args, self.potential = args, load_potential(args.model, args.device)
        reference = read_reference(args.ref).isolated(self.potential.cutoff)
        self.temperature = args.temperature or reference.temperature_K or T
        self.setting = Setting(reference.frames, self.temperature, reference.temperature_K)
        self.observable = MeanBond(self.setting.topology)
        self.criteria = criteria_from("", self.setting, default_criteria(self.setting, VERDICT))

    def __call__(self):
        """Samples of the replicas that went through, after a quarter of the time."""
        integrator, n_steps = Langevin(0.5 * units.fs, 0.01 / units.fs), round(2000 * self.args.time)
        state = start(self.potential, self.setting.frames, self.args.replicas, self.temperature, integrator, self.args.seed)
        criteria = [criterion.for_model(self.potential) for criterion in self.criteria]
        _, trajectory, failures = watched(state, integrator, PotentialForces(self.potential), n_steps, criteria, sample_every=20)
        kept = (trajectory.steps[:, None] > n_steps // 4) & ~failures.failed
        print(f"  {int((~failures.failed).sum())} of {self.args.time:g} ps without a failure", flush=True)
        return Samples.from_trajectory(trajectory.keep(kept), [self.observable])

    def moved(self, direction, length):
        """The parameters by so much along a direction."""
        with torch.no_grad():
            for p, part in zip(self.potential.parameters(), direction):
                p.add_((length * part).to(p.dtype))


def of_replicas(samples, values):
    """The mean of each replica, by its number."""
    sums, counts = (torch.bincount(samples.replica, weights) for weights in (values.double(), torch.ones_like(values).double()))
    return {int(k): float(sums[k] / counts[k]) for k in counts.nonzero()[:, 0]}


def molecule(args) -> None:
    """The derivative of the mean bond length along its own gradient."""
    run = Dynamics(args)
    point, potential, name = StatePoint(run.temperature), run.potential, run.observable.name
    print(f"{args.model} at {run.temperature:g} K, Langevin dynamics")
    samples = run()
    target = Target(run.observable, samples.values[name].mean(dim=0) - 0.5)  # a residual of one: the gradient is that of the mean
    estimate = Estimator(point)(samples, [target])
    accumulate(potential, estimate)
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in potential.parameters()]
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in gradient))
    direction = [part / norm for part in gradient]
    found = projection(potential, estimate, [target], point, direction)
    probe = 1e-4 * math.sqrt(sum(float(p.detach().double().square().sum()) for p in potential.parameters()))
    run.moved(direction, probe)
    length = 0.2 / point.beta / float(energy_change(potential, samples).std()) * probe  # energies change by 0.2 kT
    run.moved(direction, length - probe)
    above = run()
    run.moved(direction, -2 * length)
    below = run()
    up, down = (of_replicas(side, side.values[name][:, 0]) for side in (above, below))
    both = np.array([(up[k] - down[k]) / (2 * length) for k in up.keys() & down.keys()])
    measured, error = both.mean(), both.std(ddof=1) / math.sqrt(len(both))
    z = (found.value - measured) / math.hypot(found.error, error)
    print(f"estimator {found.value:.4g} ± {found.error:.1g}, finite differences {measured:.4g} ± {error:.1g} Å per length, z = {z:.1f}")
    if not abs(z) < WORST:
        sys.exit("the estimator is not the derivative that dynamics have")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="of a molecule, that seldom fails")
    parser.add_argument("--ref", help="frames of it")
    parser.add_argument("--temperature", type=float, help="in K (default: what the frames tell)")
    parser.add_argument("--replicas", type=int, default=64, help="of the molecule (default: %(default)s)")
    parser.add_argument("--time", type=float, default=10.0, help="ps of each, three times over (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer sets")
    args = parser.parse_args()
    if (args.model is None) != (args.ref is None):
        parser.error("--model and --ref belong together")
    torch.set_num_threads(1)
    if args.model:
        return molecule(args)
    numbers, sets = ((50, 200, 800), 10) if args.quick else ((100, 1000, 10_000), 40)
    print(f"{'':34s} {'samples':>7s} {'sets':>6s}  {'answer':>21s}  {'exact':>11s} {'z':>6s}")
    for what, (answer, exact) in CASES.items():
        for n in numbers:
            repeated(what, answer, exact, n, sets)
    biases(100 if args.quick else 1000)
    print("\nthe path gradient: examples/path_gradient.py")


if __name__ == "__main__":
    main()
