"""Energy and force training: the loss and the errors by hand, reference energies, pretraining and its exact resume."""

import copy
import io

import numpy as np
import pytest
import tiny
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from scipy.optimize import minimize_scalar

from stabie_ase.potentials.analytic import Morse
from stabie_ase.potentials.family import families
from stabie_ase.structures.neighbors import neighbor_list
from stabie_ase.structures.reference import Reference, reference_energies
from stabie_ase.system.options import BadOption, from_dict
from stabie_ase.training.labels import LabelledFrames, QMLoss, energy_offset, force_errors_by_frame, minibatch, qm_errors, upper_limit
from stabie_ase.training.options import DynamicsOptions, FinetuneOptions
from stabie_ase.training.pretrain import Pretraining, pretrain
from stabie_ase.training.pretrain_options import PretrainOptions


def of_sizes(*sizes, seed=0):
    """Carbon clusters with labels drawn at random."""
    rng = np.random.default_rng(seed)
    frames = [Atoms("C" * n, 1.5 * np.arange(n)[:, None] * [1.0, 0.1, 0.0] + rng.normal(scale=0.1, size=(n, 3))) for n in sizes]
    return Reference(frames, rng.normal(size=len(sizes)), [rng.normal(size=(n, 3)) for n in sizes], None, "made up")


def predictions(potential, frames):
    """Energies and forces one frame at a time."""
    results = []
    for k in range(len(frames)):
        batch = frames.batch.select([k])
        results.append(potential.compute(batch, neighbor_list(batch, potential.cutoff)))
    return [float(r.energies) for r in results], [r.forces.double().numpy() for r in results]


# -- loss and errors


def test_force_errors_by_frame():
    reference = of_sizes(2, 3, 5)
    frames, potential = LabelledFrames.from_reference(reference), tiny.truth()
    _, forces = predictions(potential, frames)
    expected = [np.abs(f - f_ref).mean() for f, f_ref in zip(forces, reference.forces)]
    np.testing.assert_allclose(force_errors_by_frame(potential, frames), expected, rtol=1e-12)
    np.testing.assert_allclose(force_errors_by_frame(potential, frames, chunk_size=2), expected, rtol=1e-12)


def test_upper_limit_covers_the_mean_as_often_as_student_says():
    """Of 4000 samples of five; of one number it is that number."""
    generator = torch.Generator().manual_seed(0)
    samples = 0.3 + torch.randn((4000, 5), generator=generator, dtype=torch.float64)
    for confidence in (0.9, 0.5):
        covered = np.mean([upper_limit(x, confidence) >= 0.3 for x in samples])
        assert abs(covered - confidence) < 4 * np.sqrt(confidence * (1.0 - confidence) / 4000)
    assert upper_limit(torch.tensor([0.7]), 0.9) == pytest.approx(0.7)


def test_loss_by_hand():
    """w_E (ΔU)²/N + w_F Σ‖ΔF‖²/(3N), the mean over frames of different size."""
    reference = of_sizes(2, 3, 5)
    frames, potential = LabelledFrames.from_reference(reference), tiny.truth()
    energies, forces = predictions(potential, frames)
    terms = [
        0.7 * (e - e_ref) ** 2 / len(f) + 2.5 * np.sum((f - f_ref) ** 2) / (3 * len(f))
        for e, e_ref, f, f_ref in zip(energies, reference.energies, forces, reference.forces)
    ]
    loss = QMLoss(energy_weight=0.7, forces_weight=2.5)(potential, frames)
    assert loss.dtype == torch.float64
    assert float(loss.detach()) == pytest.approx(np.mean(terms), rel=1e-12)


def test_what_all_atoms_are_off_by_counts_by_its_own_weight():
    """δ is the shift of all atoms that fits the energies best, here by scipy; what is left counts whole, δ by a tenth."""
    reference = of_sizes(2, 3, 5)
    frames, potential, n = LabelledFrames.from_reference(reference), tiny.truth(), np.array([2, 3, 5])
    difference = np.array(predictions(potential, frames)[0]) - reference.energies
    best = minimize_scalar(lambda shift: np.mean((difference - n * shift) ** 2 / n), tol=1e-12)
    loss, offset = QMLoss(0.7, 0.0, offset_weight=0.1).with_offset(potential, frames)
    assert float(offset.detach()) == pytest.approx(best.x, rel=1e-6) == energy_offset(potential, frames)
    assert float(loss.detach()) == pytest.approx(0.7 * (best.fun + 0.1 * n.mean() * best.x**2), rel=1e-6)


def test_of_a_single_frame_the_whole_energy_counts():
    frames, potential = LabelledFrames.from_reference(of_sizes(3)), tiny.truth()
    assert torch.equal(QMLoss(offset_weight=0.0)(potential, frames), QMLoss()(potential, frames))


@pytest.mark.parametrize("offset_weight", [1.0, 0.01])
@pytest.mark.parametrize("name", ["depth", "a", "r0"])
def test_gradient_of_the_loss_against_finite_differences(name, offset_weight):
    frames, loss = LabelledFrames.from_reference(of_sizes(2, 3, 5)), QMLoss(0.7, 2.5, offset_weight)
    values = {"depth": 3.0, "a": 1.8, "r0": 1.5}
    potential = Morse(**values)
    loss(potential, frames).backward()
    h = 1e-5
    plus, minus = (float(loss(Morse(**values | {name: values[name] + s * h}), frames).detach()) for s in (1, -1))
    assert float(getattr(potential, name).grad) == pytest.approx((plus - minus) / (2 * h), rel=1e-7)


def test_gradient_of_the_loss_for_a_network():
    frames, potential = LabelledFrames.from_reference(tiny.reference().subset(range(3))), tiny.model().double()
    QMLoss()(potential, frames).backward()
    weight = potential.network.lin1.weight
    h, k = 1e-5, np.unravel_index(int(weight.grad.abs().argmax()), weight.shape)
    values = []
    for step in (h, -2 * h):
        with torch.no_grad():
            weight[k] += step
        values.append(float(QMLoss()(potential, frames).detach()))
    assert float(weight.grad[k]) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


def test_errors_by_hand():
    reference, potential = of_sizes(2, 3, 5, 2), tiny.truth()
    frames = LabelledFrames.from_reference(reference)
    energies, forces = predictions(potential, frames)
    d_e = np.array(energies) - reference.energies
    d_f = np.concatenate(forces) - np.concatenate(reference.forces)
    for chunk_size in (64, 3, 1):
        errors = qm_errors(potential, frames, chunk_size)
        assert errors.force_mae_eV_per_A == pytest.approx(np.abs(d_f).mean(), rel=1e-12)
        assert errors.force_rmse_eV_per_A == pytest.approx(np.sqrt((d_f**2).mean()), rel=1e-12)
        assert errors.energy_mae_eV == pytest.approx(np.abs(d_e).mean(), rel=1e-12)
        assert errors.energy_mae_offset_removed_eV == pytest.approx(np.abs(d_e - d_e.mean()).mean(), rel=1e-12)


def test_errors_of_the_truth_vanish_and_leave_no_trace():
    potential = tiny.truth()
    errors = qm_errors(potential, LabelledFrames.from_reference(tiny.reference()))
    assert errors.force_mae_eV_per_A < 1e-6 and errors.energy_mae_eV < 1e-6  # what extxyz rounds off
    assert all(p.requires_grad and p.grad is None for p in potential.parameters())


def test_select_and_chunks_keep_labels_with_their_frames():
    reference = of_sizes(2, 3, 5, 4)
    frames = LabelledFrames.from_reference(reference)
    chosen = frames.select(torch.tensor([3, 1]))
    assert chosen.energies.tolist() == [reference.energies[3], reference.energies[1]]
    np.testing.assert_array_equal(chosen.forces.numpy(), np.concatenate([reference.forces[3], reference.forces[1]]))
    np.testing.assert_array_equal(chosen.batch.positions.numpy()[:4], reference.frames[3].positions)
    assert [len(part) for part in frames.chunks(3)] == [3, 1]


# -- minibatches


@pytest.mark.parametrize("n, size", [(12, 4), (13, 4), (5, 5), (3, 8), (7, 1)])
def test_minibatches_cover_an_epoch_without_repeating(n, size):
    per_epoch = n // min(size, n)
    for epoch in range(3):
        drawn = torch.cat([minibatch(n, size, 0, epoch * per_epoch + k) for k in range(per_epoch)]).tolist()
        assert len(drawn) == len(set(drawn)) == per_epoch * min(size, n)
        assert set(drawn) <= set(range(n))


def test_minibatches_leave_out_no_frame_for_good():
    """Where the size does not divide the number of frames, the ones left over change."""
    assert {int(k) for step in range(60) for k in minibatch(13, 4, 0, step)} == set(range(13))


def test_minibatch_is_a_function_of_its_arguments():
    one = [minibatch(20, 6, 5, step).tolist() for step in (0, 1, 2, 7)]
    np.random.seed(1)
    torch.manual_seed(1)
    assert one == [minibatch(20, 6, 5, step).tolist() for step in (0, 1, 2, 7)]
    assert one[0] != one[3]
    assert one[0] != minibatch(20, 6, 6, 0).tolist()


# -- reference energies


def labelled_energies(formulas, energy_of):
    frames = [Atoms(f, 2.0 * np.arange(3 * len(Atoms(f))).reshape(-1, 3)) for f in formulas]
    energies = np.array([sum(energy_of[s] for s in atoms.symbols) for atoms in frames])
    return Reference(frames, energies, [np.zeros((len(a), 3)) for a in frames], None, "made up")


def test_reference_energies_of_varied_compositions():
    energy_of = {"H": -13.6, "C": -1030.0, "O": -2040.0}
    found = reference_energies(labelled_energies(["H2", "CH4", "CO2", "H2O", "C2H6O"], energy_of))
    assert found == pytest.approx({1: -13.6, 6: -1030.0, 8: -2040.0})


def test_reference_energies_of_one_composition_sum_to_the_mean():
    """Open by one dimension for each element beyond the first: the smallest solution, exact in the sum."""
    reference = labelled_energies(["CH4"] * 3, {"C": -1030.0, "H": -13.6})
    found = reference_energies(reference)
    assert found[6] + 4 * found[1] == pytest.approx(-1084.4)
    assert found[1] == pytest.approx(4 * found[6])  # parallel to the composition (1, 4): the minimum norm


# -- pretraining


def training(**changes):
    settings = {"epochs": 8, "batch_size": 12, "learning_rate": 5e-3, "seed": 1} | changes
    return Pretraining(tiny.new_schnet(seed=1), tiny.reference(), PretrainOptions(**settings))


def test_pretraining_learns_a_morse_potential():
    run = training(epochs=90)
    start = qm_errors(run.potential, run.validation)
    pretrain(run)
    end = qm_errors(run.potential, run.validation)
    # Measured for seeds 0 to 4: ratios of 0.42 to 0.67.
    assert end.force_rmse_eV_per_A < 0.8 * start.force_rmse_eV_per_A
    assert end.force_rmse_eV_per_A == pytest.approx(run.best_error, rel=1e-6)


def test_the_best_by_validation_is_kept():
    run, errors = training(epochs=6, learning_rate=0.3, ema_decay=0.0), []
    for _ in range(6):
        run.run_epoch()
        errors.append(qm_errors(run.potential, run.validation).force_rmse_eV_per_A)
    assert run.best_epoch == 1 + int(np.argmin(errors)) != 6  # a step so long does not end at its best
    run.take_best()
    assert qm_errors(run.potential, run.validation).force_rmse_eV_per_A == pytest.approx(min(errors), rel=1e-6)


def test_validation_frames_are_not_trained_on():
    run = training()
    trained, held_out = ({tuple(p.positions.ravel()) for p in part.batch.to_atoms()} for part in (run.train, run.validation))
    assert len(trained) == 32 and len(held_out) == 8 and not trained & held_out


def test_average_of_the_weights():
    run = training(ema_decay=0.9)
    expected = {name: x.clone() for name, x in run.potential.state_dict().items()}
    run._update_average()  # the weights have not moved
    assert all(torch.allclose(run.average[name], x) for name, x in expected.items())
    with torch.no_grad():
        run.potential.network.lin1.weight += 1.0
    run._update_average()
    torch.testing.assert_close(run.average["network.lin1.weight"], expected["network.lin1.weight"] + 0.1)


def test_learning_rate_halves_on_a_plateau_and_ends_training():
    run = training(patience=1, min_learning_rate=2e-3, epochs=1000)
    run.best_error = 0.0  # never to be beaten
    pretrain(run)
    assert run.epoch < 5 and run.optimizer.param_groups[0]["lr"] < 2e-3


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_interrupted_and_resumed_is_uninterrupted_to_the_last_bit(stop):
    whole = training()
    pretrain(whole)

    first = training()
    for _ in range(stop):
        first.run_epoch()
    file = io.BytesIO()
    torch.save(first.state(), file)
    second = training()
    for p in second.potential.parameters():
        p.data += 1.0  # nothing of a fresh start may be left over
    file.seek(0)
    second.restore(torch.load(file, weights_only=True))
    pretrain(second)

    assert second.epoch == whole.epoch and second.best_error == whole.best_error
    for name, x in whole.potential.state_dict().items():
        assert torch.equal(second.potential.state_dict()[name], x), name


def test_state_is_a_snapshot():
    run = training()
    run.run_epoch()
    state = run.state()
    before = copy.deepcopy(state)
    run.run_epoch()
    assert torch.equal(state["average"]["network.lin1.weight"], before["average"]["network.lin1.weight"])
    assert torch.equal(state["model"]["network.lin1.weight"], before["model"]["network.lin1.weight"])


def test_builders_give_models_for_the_elements_of_the_reference():
    potential = families()["schnet"].build(tiny.reference())
    assert potential.numbers == (6,)
    errors = qm_errors(potential, LabelledFrames.from_reference(tiny.reference()))
    assert errors.energy_mae_eV < 10.0  # reference energies are in


def test_mace_builder():
    pytest.importorskip("mace")
    potential = families()["mace"].build(tiny.reference().subset(range(10)))
    assert potential.numbers == (6,)
    QMLoss()(potential, LabelledFrames.from_reference(tiny.reference().subset(range(2)))).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in potential.parameters())


# -- options


def test_unknown_and_wrong_options():
    with pytest.raises(BadOption, match="unknown option 'epoch'; did you mean 'epochs'"):
        from_dict(PretrainOptions, {"epoch": 3})
    with pytest.raises(BadOption, match="expected a whole number"):
        PretrainOptions(epochs=2.5)
    with pytest.raises(BadOption, match="expected text"):
        from_dict(FinetuneOptions, {"thermostat": None})
    assert DynamicsOptions(timestep_fs=1, temperature_K=np.float64(300.0)).steps(10.0) == 10


def test_integrator_of_the_options():
    from ase import units

    langevin = DynamicsOptions(timestep_fs=2.0, sample_every_fs=10.0, friction_per_fs=0.02).integrator
    assert (langevin.timestep, langevin.friction) == (2.0 * units.fs, 0.02 / units.fs)
    chain = DynamicsOptions(thermostat="nose-hoover", relaxation_time_fs=40.0).integrator
    assert (chain.timestep, chain.relaxation_time) == (0.5 * units.fs, 40.0 * units.fs)


def test_labels_come_from_the_calculator_unchanged():
    atoms = Atoms("C2", [[0, 0, 0], [0, 0, 1.5]])
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.arange(6.0).reshape(2, 3))
    reference = Reference([atoms], np.array([-1.0]), [atoms.calc.results["forces"]], None, "made up")
    frames = LabelledFrames.from_reference(reference)
    assert frames.forces.tolist() == np.arange(6.0).reshape(2, 3).tolist() and frames.energies.tolist() == [-1.0]
