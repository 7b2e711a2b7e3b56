"""Natural gradient steps: against dense linear algebra, and the change of forces that they foretell."""

import pytest
import torch
from helpers import METHANOL, WATER, schnet

from stabie_ase.potentials.base import Potential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.training.labels import LabelledFrames, QMLoss
from stabie_ase.training.updates.direction import SQUARES_FLOOR, natural_direction

LOSS = QMLoss()


def terms_of(r):
    """Six functions of the distances of pairs."""
    return torch.stack([torch.exp(-r), torch.exp(-r / 2), 1 / r, 1 / r**2, torch.sin(r), torch.cos(2 * r)], dim=1)


class Linear(Potential):
    """Energies linear in six parameters, so that the metric does not depend on them."""

    cutoff = 5.0

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 4, dtype=torch.float64))
        self.phi = torch.nn.Parameter(torch.tensor([0.5, 0.1], dtype=torch.float64))
        self.idle = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def energies(self, batch, neighbors):
        r = neighbors.half.vectors(batch).norm(dim=1)
        terms = terms_of(r)
        owner = batch.system[neighbors.half.pairs[0]]
        return torch.zeros(batch.n_systems, dtype=r.dtype).index_add(0, owner, terms @ torch.cat([self.theta, self.phi]))


class Parted(Linear):
    """The same, each pair's energy half to either atom; and two parameters more that move energy between the atoms of a system."""

    def __init__(self):
        super().__init__()
        self.between = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def atomic_energies(self, batch, neighbors):
        r = neighbors.vectors(batch).norm(dim=1)
        terms = terms_of(r)
        i = neighbors.pairs[0]
        pairs = 0.5 * torch.zeros(batch.n_atoms, dtype=r.dtype).index_add(0, i, terms @ torch.cat([self.theta, self.phi]))
        near = torch.zeros((batch.n_atoms, 2), dtype=r.dtype).index_add(0, i, terms[:, [0, 3]])
        mean = batch.sum_over_atoms(near) / batch.counts[:, None]
        return pairs + (near - mean[batch.system]) @ self.between


def systems():
    rng = torch.Generator().manual_seed(3)
    batches = [AtomsBatch.from_atoms([METHANOL, WATER, METHANOL]), AtomsBatch.from_atoms([WATER, WATER])]
    return [b.replace(positions=b.positions + 0.1 * torch.randn(b.positions.shape, generator=rng)) for b in batches]


def predicted(potential, batch):
    p = potential.compute(batch, neighbor_list(batch, potential.cutoff))
    return LabelledFrames(batch, p.energies, p.forces.double())


def dense_metric(potential, frames, atomic_weight=0.0):
    """The Hessian of the loss against the potential's own predictions, by autograd alone."""
    targets = [predicted(potential, part) for part in frames]
    parameters = list(potential.parameters())
    total = sum(LOSS(potential, t) for t in targets) / len(targets)
    for part in frames if atomic_weight else []:
        of_atoms = potential(part, neighbor_list(part, potential.cutoff), of_atoms=True)
        change = of_atoms - of_atoms.detach()
        total = total + atomic_weight * (change - change.mean()).square().mean() / len(frames)

    def flat(grads):
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters)])

    first = flat(torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True))
    return torch.stack([flat(torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True)) for x in first])


def set_gradient(potential, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for p in potential.parameters():
        p.grad = torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p.dtype)


def test_enough_iterations_solve_the_linear_system():
    potential, frames = Linear(), systems()
    set_gradient(potential)
    potential.idle.grad = None
    g = torch.cat([potential.theta.grad, potential.phi.grad])
    h = dense_metric(potential, frames)[:6, :6]
    shift = 0.1 * float(g @ h @ g / (g @ g))
    exact = torch.linalg.solve(h + shift * torch.eye(6), g)
    direction, change = natural_direction(potential, frames, LOSS, iterations=12, damping=0.1)
    torch.testing.assert_close(torch.cat(direction[:2]), exact, rtol=1e-5, atol=1e-8)
    assert (direction[2] == 0).all()
    assert change == pytest.approx(float((0.5 * exact @ h @ exact).sqrt()), rel=1e-5)


def test_energy_that_moves_from_atom_to_atom_costs_by_its_weight():
    """Where a gradient is made of energies of some atoms, nothing else keeps the solution from moving energy between them alone."""
    potential, frames, weight = Parted(), systems(), 2.0
    batch = frames[0]
    with torch.no_grad():
        before = potential(batch, neighbor_list(batch, potential.cutoff))
        potential.between += 1.0
        torch.testing.assert_close(potential(batch, neighbor_list(batch, potential.cutoff)), before)
        potential.between.zero_()
    set_gradient(potential)
    potential.idle.grad = None
    g = torch.cat([potential.theta.grad, potential.phi.grad, potential.between.grad])
    own = [0, 1, 2, 3, 4, 5, 8, 9]
    h, seen = (dense_metric(potential, frames, w)[own][:, own] for w in (weight, 0.0))
    shift = 0.1 * float(g @ h @ g / (g @ g))
    exact = torch.linalg.solve(h + shift * torch.eye(8), g)
    direction, change = natural_direction(potential, frames, LOSS, iterations=16, damping=0.1, atomic_weight=weight)
    torch.testing.assert_close(torch.cat([direction[0], direction[1], direction[3]]), exact, rtol=1e-4, atol=1e-7)
    assert change == pytest.approx(float((0.5 * exact @ seen @ exact).sqrt()), rel=1e-4)  # what forces and energies change by
    assert float(h[6:, 6:].diagonal().min()) > 1e-3 and float(seen[6:].abs().max()) < 1e-12


def test_squares_of_gradients_change_the_way_to_the_solution_and_not_the_solution():
    """The damping, a fraction of the first direction's curvature, follows the way."""
    potential, frames = Linear(), systems()
    h = dense_metric(potential, frames)[:6, :6]
    squares = [torch.linspace(1e-3, 2.0, 4), torch.tensor([0.3, 0.0]), torch.zeros(2)]
    scale = torch.cat(squares[:2]).double() / 2.0 + SQUARES_FLOOR
    set_gradient(potential)
    potential.idle.grad = None
    g = torch.cat([potential.theta.grad, potential.phi.grad])
    p = g / scale
    exact = torch.linalg.solve(h + 0.1 * float(p @ h @ p / (p @ p)) * torch.eye(6), g)
    direction, _ = natural_direction(potential, frames, LOSS, iterations=20, damping=0.1, squares=squares)
    torch.testing.assert_close(torch.cat(direction[:2]), exact, rtol=1e-4, atol=1e-6)
    assert (direction[2] == 0).all()


def test_squares_of_gradients_save_iterations():
    """Of a metric whose diagonal spans orders of magnitude one iteration with its diagonal does what several do without."""
    gained = {}
    for known in (False, True):
        potential, frames = schnet(torch.float64), systems()
        squares = None
        if known:
            squares = [torch.zeros_like(p) for p in potential.parameters()]
            for part in frames:
                rng = torch.Generator().manual_seed(5)
                off = predicted(potential, part)
                off.forces.add_(0.1 * torch.randn(off.forces.shape, generator=rng, dtype=torch.float64))
                for p in potential.parameters():
                    p.grad = None
                LOSS(potential, off).backward()
                for square, p in zip(squares, potential.parameters()):
                    square.add_(torch.zeros_like(p) if p.grad is None else p.grad.square())
        set_gradient(potential, seed=1)
        g = [p.grad.double().clone() for p in potential.parameters()]
        direction, change = natural_direction(potential, frames, LOSS, 4, squares=squares)
        gained[known] = sum(float((a * b).sum()) for a, b in zip(g, direction)) / change
    assert gained[True] > 1.5 * gained[False]


def test_frames_that_took_no_part_tell_the_change():
    potential, frames = Linear(), systems()
    set_gradient(potential)
    direction, change = natural_direction(potential, frames[:1], LOSS, iterations=3, unseen=frames[1:])
    d, h = torch.cat(direction), dense_metric(potential, frames[1:])
    assert change == pytest.approx(float((0.5 * d @ h @ d).sqrt()), rel=1e-5)


def test_no_iterations_leave_the_gradient():
    potential, frames = Linear(), systems()
    set_gradient(potential)
    g = [p.grad.clone() for p in potential.parameters()]
    direction, change = natural_direction(potential, frames, LOSS, iterations=0)
    assert all(torch.equal(a, b) for a, b in zip(direction, g))
    flat = torch.cat(g)
    assert change == pytest.approx(float((0.5 * flat @ dense_metric(potential, frames) @ flat).sqrt()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_changes_its_forces_as_foretold_and_less_than_by_the_plain_gradient(dtype):
    potential, frames = schnet(dtype), systems()
    before = {name: x.clone() for name, x in potential.state_dict().items()}
    now = [predicted(potential, part) for part in frames]
    gained = {}
    for iterations in (0, 15):
        set_gradient(potential, seed=1)
        g = [p.grad.double().clone() for p in potential.parameters()]
        direction, change = natural_direction(potential, frames, LOSS, iterations)
        assert all(torch.equal(x, before[name]) for name, x in potential.state_dict().items())
        assert all(p.grad is None for p in potential.parameters())
        length = 2e-4 / change
        with torch.no_grad():
            for p, part in zip(potential.parameters(), direction):
                p -= (length * part).to(p.dtype)
        moved = sum(LOSS(potential, t).item() for t in now) / len(now)
        assert moved**0.5 == pytest.approx(2e-4, rel=0.05)
        gained[iterations] = length * sum(float((a * b).sum()) for a, b in zip(g, direction))
        potential.load_state_dict(before)
    assert gained[15] > 3 * gained[0]  # of the loss, for the same change of the forces


def test_no_gradient_is_no_step():
    potential, frames = Linear(), systems()
    direction, change = natural_direction(potential, frames, LOSS, iterations=5)
    assert change == 0 and all((part == 0).all() for part in direction)
