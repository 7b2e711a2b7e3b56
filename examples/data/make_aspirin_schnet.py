"""Make the packaged starting model: a SchNet trained on the 50 packaged aspirin frames, which fails within picoseconds.

Run from anywhere, a few minutes on two cores:

    python examples/data/make_aspirin_schnet.py --output stabie_ase/data/aspirin_schnet.pt
"""

import argparse
from importlib.resources import files

import torch

from stabie_ase.potentials.checkpoint import save_potential
from stabie_ase.potentials.family import families
from stabie_ase.structures.reference import read_reference
from stabie_ase.training.labels import LabelledFrames, qm_errors
from stabie_ase.training.pretrain import Pretraining, pretrain
from stabie_ase.training.pretrain_options import PretrainOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="checkpoint to write")
    parser.add_argument("--epochs", type=int, default=5000, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    data = files("stabie_ase") / "data"
    reference = read_reference(str(data / "aspirin_xtb_train.xyz"))
    torch.manual_seed(options.seed)
    potential = families()["schnet"].build(reference)
    training = Pretraining(potential, reference, PretrainOptions(epochs=options.epochs, seed=options.seed))

    def report(record):
        if record["epoch"] % 50 == 0:
            print(f"epoch {record['epoch']}, validation force MAE {1000 * record['force_mae_eV_per_A']:.1f} meV/Å", flush=True)

    pretrain(training, report)
    save_potential(potential, options.output)
    errors = qm_errors(potential, LabelledFrames.from_reference(read_reference(str(data / "aspirin_xtb_test.xyz"))))
    print(f"{training.epoch} epochs, best {training.best_epoch}; on the test frames: force MAE "
          f"{1000 * errors.force_mae_eV_per_A:.1f} meV/Å, energy MAE {1000 * errors.energy_mae_offset_removed_eV:.1f} meV")


if __name__ == "__main__":
    main()
