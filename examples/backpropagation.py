#!/usr/bin/env python
"""The gradient of an observable's loss by the Boltzmann estimator, and by backpropagation through the dynamics.

    python examples/backpropagation.py --output found      # a quarter of an hour; a table, found.json and found.png
    python examples/backpropagation.py --quick

Replicas of aspirin run N steps of Langevin dynamics from where some time under the model has brought them. The loss is that of h(r),
averaged over frames along the way, beside the reference's. With the residual v = ∂L/∂ḡ of all samples and s = v·g, three gradients
are formed:

* backpropagation: ∂⟨s⟩/∂θ through all steps, the noise held (Raja et al., arXiv 2402.13984, appendix A.13);
* estimator: -β Cov(s, ∂U/∂θ), which is that of the mean in equilibrium and knows nothing of dynamics;
* response: -β Cov(s(t), ∂U(t)/∂θ - ∂U(0)/∂θ), by linear response (Kubo, J. Phys. Soc. Jpn. 12, 570, 1957) the change of the mean of
  a system that was in equilibrium at t = 0, which is the mean of what backpropagation gives: where dynamics start does not depend
  on θ, so that little of the change in equilibrium has come about after a short time. It goes to the estimator's as starts are
  forgotten; by then paths are chaotic, and backpropagation's mean is lost in noise that grows exponentially.

Given are cosines between them (`back:est` and so on), and how well each agrees with itself (`back`, `resp`, `est`): the cosine of the
gradients from two halves of the replicas, which is small where noise rules. `norm` is that of backpropagation's over the estimator's.
`MB` is the most memory that autograd holds at once, of one replica or one frame; `s` the time, that of the dynamics included.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from ase import units
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import stabie_ase
from stabie_ase import (
    AtomsBatch,
    DistanceDistribution,
    Estimator,
    Langevin,
    MDState,
    Potential,
    PotentialForces,
    Recorder,
    Samples,
    StatePoint,
    Target,
    Trajectory,
    accumulate_gradient,
    initial_state,
    load_potential,
    read_reference,
    simulate,
)
from stabie_ase.dynamics.integrators import update_forces
from stabie_ase.dynamics.random import NOISE, normals
from stabie_ase.structures.neighbors import neighbor_list

DATA = Path(stabie_ase.__file__).parent / "data"
INTEGRATOR, POINT = Langevin(timestep=0.5 * units.fs, friction=0.01 / units.fs), StatePoint(500.0)
EVERY, AT_ONCE, CHUNK = 5, 2, 32
"""Steps between two frames; replicas that are unrolled together, and frames in one backward pass of the estimator."""

MAX_DEVIATION = 1e-9
"""Between positions by the steps here and by the package's after the first few, in Å: its noise has a factor in single precision."""

PROBE = 1e-4
"""Length of a finite difference of the weights."""

HEAD = ("steps", "norm", "back:est", "back:resp", "resp:est", "back", "resp", "est", "back MB", "est MB", "back s", "est s")
ROW = "{:>5s} {:>8s}  {:>8s} {:>9s} {:>8s}  {:>6s} {:>6s} {:>6s}  {:>7s} {:>6s}  {:>6s} {:>6s}"


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the memory that graphs hold in MB, each storage once and as long as a graph keeps it, and the most that it has been."""

    def __init__(self):
        super().__init__(lambda tensor: Saved(self, tensor), lambda saved: saved.tensor)
        self.users, self.held, self.peak = {}, 0.0, 0.0

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    def change(self, storage: tuple[int, int], by: int) -> None:
        users = self.users.get(storage, 0)
        self.users[storage] = users + by
        if not users or not users + by:
            self.held += by * storage[1] / 1e6
            self.peak = max(self.peak, self.held)


class Saved:
    """A tensor that a graph keeps."""

    def __init__(self, counter: SavedBytes, tensor: Tensor):
        storage = tensor.untyped_storage()
        self.counter, self.tensor, self.storage = counter, tensor, (storage.data_ptr(), storage.nbytes())
        counter.change(self.storage, 1)

    def __del__(self):
        self.counter.change(self.storage, -1)


def forces(potential: Potential, batch: AtomsBatch) -> Tensor:
    """With their graph, shape (n_atoms, 3), in eV/Å."""
    with torch.no_grad():
        neighbors = neighbor_list(batch, potential.cutoff)
    (gradient,) = torch.autograd.grad(potential(batch, neighbors).sum(), batch.positions, create_graph=True)
    return -gradient


def unrolled(potential: Potential, state: MDState, n_steps: int) -> list[AtomsBatch]:
    """Frames of BAOAB dynamics with the graph of all steps, and the noise that the package's integrator draws."""
    dt, decay = INTEGRATOR.timestep, math.exp(-INTEGRATOR.friction * INTEGRATOR.timestep)
    masses, frames = state.batch.masses[:, None], []
    sigma = torch.sqrt((1 - decay**2) * masses * units.kB * POINT.temperature_K)
    batch, p = state.batch.replace(positions=state.batch.positions.clone().requires_grad_(True)), state.momenta
    f = forces(potential, batch)
    for k in range(n_steps):
        p = p + dt / 2 * f
        p_new = decay * p + sigma * normals(state.batch, state.key, state.step + k, NOISE)
        batch = batch.replace(positions=batch.positions + dt / 2 * (p + p_new) / masses)
        f = forces(potential, batch)
        p = p_new + dt / 2 * f
        if (k + 1) % EVERY == 0:
            frames.append(batch)
    return frames


def flat(potential: Potential) -> Tensor:
    """The gradient that the parameters hold, taken from them, float64, shape (n_parameters,)."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in potential.parameters()]
    potential.zero_grad()
    return torch.cat([x.double().flatten() for x in parts])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


class Comparison:
    """One window of dynamics, and the gradients of its loss.

    Parameters
    ----------
    potential : Potential
    state : MDState
        Replicas in equilibrium, an even number.
    target : Target
    n_steps : int
    """

    def __init__(self, potential: Potential, state: MDState, target: Target, n_steps: int):
        self.potential, self.state, self.observable, self.n_steps = potential, state, target.observable, n_steps
        self.trajectory = self.simulated(state)
        self.samples = Samples.from_trajectory(self.trajectory, [target.observable])
        values = self.samples.values[target.observable.name]
        self.residual = 2.0 * target.metric * (values.mean(dim=0) - target.value)
        self.s, self.weights = values @ self.residual, Estimator(POINT)(self.samples, [target]).weights

    def simulated(self, state: MDState) -> Trajectory:
        """By the package."""
        recorder, forces = Recorder(state, self.n_steps, EVERY), PotentialForces(self.potential)
        simulate(update_forces(state, forces), INTEGRATOR, forces, self.n_steps, [recorder])
        return recorder.trajectory

    def backpropagation(self, replicas: Tensor) -> tuple[Tensor, float]:
        """Gradient of ⟨s⟩ over these replicas, shape (n,), and the memory that one takes, in MB."""
        peak, starts = 0.0, self.trajectory.positions[0].view(self.state.n_systems, -1, 3)
        for some in replicas.split(AT_ONCE):
            with SavedBytes() as saved:
                frames = unrolled(self.potential, self.state.select(some), self.n_steps)
                s = torch.cat([self.observable.values(frame) for frame in frames]) @ self.residual
                (s.sum() / (len(frames) * len(replicas))).backward()
            peak = max(peak, saved.peak / len(some))
            off = float((frames[0].positions.detach() - starts[some].flatten(0, 1)).abs().max())
            check(off < MAX_DEVIATION, f"the unrolled steps are {off:.2g} Å off the package's, expected {MAX_DEVIATION:g} Å at most")
        return flat(self.potential), peak

    def estimator(self) -> tuple[Tensor, float]:
        """Gradient by the package's estimator, and the memory that one frame takes, in MB."""
        with SavedBytes() as saved:
            accumulate_gradient(self.potential, self.samples.frames, self.weights, chunk_size=CHUNK)
        return flat(self.potential), saved.peak / min(CHUNK, len(self.weights))

    def covariances(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The estimator and linear response of some samples, shape (n_samples,), written out."""
        s, n = self.s, int(chosen.sum())
        weights = torch.where(chosen, -POINT.beta / (n - 1) * (s - s[chosen].mean()), 0.0)
        accumulate_gradient(self.potential, self.samples.frames, weights, chunk_size=CHUNK)
        estimator = flat(self.potential)
        of_starts = weights.new_zeros(self.state.n_systems).index_add(0, self.samples.replica, weights)
        accumulate_gradient(self.potential, self.state.batch, of_starts, chunk_size=CHUNK)
        return estimator, estimator - flat(self.potential)

    def difference(self, direction: Tensor, replicas: Tensor) -> float:
        """Slope of ⟨s⟩ over these replicas along a direction of length one, by finite differences through the package's dynamics."""
        means, parameters = [], list(self.potential.parameters())
        for move in (PROBE, -2 * PROBE, PROBE):  # there, to the other side, and back
            vector_to_parameters(parameters_to_vector(parameters) + move * direction, parameters)
            frames = self.simulated(self.state.select(replicas)).frames()[0]
            means.append(float((self.observable.values(frames) @ self.residual).mean()))
        return (means[0] - means[1]) / (2 * PROBE)


def check(fine: bool, words: str) -> None:
    if not fine:
        sys.exit(words)


def compare(potential: Potential, state: MDState, target: Target, n_steps: int) -> dict[str, float]:
    """One row."""
    began = time.perf_counter()
    comparison = Comparison(potential, state, target, n_steps)
    dynamics = time.perf_counter() - began
    gradient, memory = comparison.estimator()
    estimator_s = time.perf_counter() - began
    halves = torch.arange(state.n_systems).view(-1, 2).T
    (a, memory_back), (b, _) = (comparison.backpropagation(half) for half in halves)
    backward_s = time.perf_counter() - began - estimator_s + dynamics
    back = (a + b) / 2
    everything = torch.ones_like(comparison.samples.replica, dtype=torch.bool)
    by_hand, response = comparison.covariances(everything)
    check(cosine(by_hand, gradient) > 1 - 1e-6, "the estimator is not the covariance")
    (e0, r0), (e1, r1) = (comparison.covariances(comparison.samples.replica % 2 == k) for k in (0, 1))
    return {
        "steps": n_steps,
        "backpropagation_norm": float(back.norm()), "response_norm": float(response.norm()), "estimator_norm": float(gradient.norm()),
        "backpropagation:estimator": cosine(back, gradient), "backpropagation:response": cosine(back, response),
        "response:estimator": cosine(response, gradient),
        "backpropagation:itself": cosine(a, b), "estimator:itself": cosine(e0, e1), "response:itself": cosine(r0, r1),
        "backpropagation_MB": memory_back, "estimator_MB": memory, "backpropagation_s": backward_s, "estimator_s": estimator_s,
    }  # fmt: skip


def check_slope(potential: Potential, state: MDState, target: Target, n_steps: int) -> None:
    """Backpropagation beside finite differences of the same path."""
    comparison, two = Comparison(potential, state, target, n_steps), torch.arange(2)
    gradient, _ = comparison.backpropagation(two)
    slope = comparison.difference(gradient / gradient.norm(), two) / float(gradient.norm())
    check(abs(slope - 1) < 1e-3, f"finite differences are {slope:.4f} times backpropagation over {n_steps} steps, expected 1 within 1e-3")


def equilibrated(potential: Potential, frames: list, replicas: int, n_steps: int, seed: int) -> MDState:
    """Replicas that have run for a while, none of which has fallen apart."""
    some = [frames[k % len(frames)] for k in range(replicas)]
    state = initial_state(AtomsBatch.from_atoms(some), PotentialForces(potential), POINT.temperature_K, seed=seed)
    return simulate(state, INTEGRATOR, PotentialForces(potential), n_steps)


def draw(rows: list[dict], path: Path) -> None:
    """Cosines, memory and time against the number of steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    steps = [row["steps"] for row in rows]
    figure, (cosines, memory, seconds) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for name, style in (("backpropagation:estimator", "-"), ("backpropagation:response", "-"), ("response:estimator", "-"),
                        ("backpropagation:itself", ":"), ("estimator:itself", ":")):  # fmt: skip
        cosines.plot(steps, [row[name] for row in rows], "o" + style, label=name)
    cosines.set(xscale="log", xlabel="steps", ylabel="cosine", ylim=(-1, 1))
    cosines.legend(fontsize="x-small")
    for axes, unit, what in ((memory, "MB", "memory of a replica or frame (MB)"), (seconds, "s", "time (s)")):
        for name in ("backpropagation", "estimator"):
            axes.plot(steps, [row[f"{name}_{unit}"] for row in rows], "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="steps", ylabel=what)
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50, 100, 200, 400], help="(default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=32, help="an even number (default: %(default)s)")
    parser.add_argument("--equilibration", type=int, default=400, metavar="STEPS", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for found.json and found.png")
    parser.add_argument("--quick", action="store_true", help="a few steps of two replicas, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.replicas, args.equilibration = [10, 20], 2, 5
    if args.replicas < 2 or args.replicas % 2 or min(args.steps) < EVERY:
        parser.error(f"expected an even number of replicas and {EVERY} steps or more")
    output = args.output or Path(tempfile.mkdtemp())
    output.mkdir(parents=True, exist_ok=True)
    potential, reference = load_potential(DATA / "aspirin_schnet.pt", dtype="float64"), read_reference(str(DATA / "aspirin_xtb_train.xyz"))
    target = Target.from_frames(DistanceDistribution.from_reference(reference.frames), reference.frames)
    state = equilibrated(potential, reference.frames, args.replicas, args.equilibration, args.seed)
    check_slope(potential, state, target, min(args.steps))
    rows = []
    print(ROW.format(*HEAD))
    for n_steps in args.steps:
        rows.append(compare(potential, state, target, n_steps))
        tell(rows[-1])
        (output / "found.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, output / "found.png")
    per_step = [row["backpropagation_MB"] / row["steps"] for row in rows]
    constant = [row["estimator_MB"] for row in rows]
    check(max(per_step) < 1.5 * min(per_step), f"the memory of backpropagation is not linear in steps: {per_step} MB a step")
    check(max(constant) < 1.5 * min(constant), f"the memory of the estimator is not constant: {constant} MB")
    print(f"Figure: {output / 'found.png'}" if args.output else "memory: linear in steps, and constant")


def tell(row: dict[str, float]) -> None:
    print(ROW.format(
        str(row["steps"]), f"{row['backpropagation_norm'] / row['estimator_norm']:.2g}",
        *(f"{row[name]:+.2f}" for name in ("backpropagation:estimator", "backpropagation:response", "response:estimator")),
        *(f"{row[name + ':itself']:+.2f}" for name in ("backpropagation", "response", "estimator")),
        *(f"{row[name]:.3g}" for name in ("backpropagation_MB", "estimator_MB", "backpropagation_s", "estimator_s")),
    ), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
