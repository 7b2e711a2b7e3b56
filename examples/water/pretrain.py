"""Train a starting model on few frames of make_water.py: a SchNet whose forces are decent, and whose water does not last.

    python examples/water/pretrain.py FOLDER/water_train.xyz --test FOLDER/water_test.xyz --output FOLDER/water_schnet.pt
    stabie-ase evaluate FOLDER/water_schnet.pt --ref FOLDER/water_test.xyz --observable rdf:O-O --timestep 1 --time 5 --replicas 4

Ten minutes on a core. The network has 3 interactions, 32 channels and a cutoff of 5 Å; --channels 64 makes the package's default one,
which takes more than twice the time in everything. A fifth of the frames is kept out of the training to choose the best weights by.
"""

import argparse
import sys
from pathlib import Path

import torch
from ase.io import write
from make_water import labelled
from teacher import Water, lattice

from stabie_ase.potentials.checkpoint import save_potential
from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.structures.batch import AtomsBatch
from stabie_ase.structures.reference import interaction_energy, read_reference, reference_energies
from stabie_ase.system.allocator import keep_freed_memory
from stabie_ase.training.labels import LabelledFrames, qm_errors
from stabie_ase.training.options import PretrainOptions
from stabie_ase.training.pretrain import Pretraining, pretrain


def trial() -> Path:
    """A model of no use, for trials of what takes one."""
    rattled(Path("water_trial.xyz"))
    path = Path("water_trial.pt")
    save_potential(built(read_reference("water_trial.xyz"), 8, 0), path)
    return path


def built(reference, channels: int, seed: int) -> SchNetPotential:
    """Random weights."""
    torch.manual_seed(seed)
    energies = reference_energies(reference)
    potential = SchNetPotential.build(energies, channels, channels)
    torch.nn.init.constant_(potential.network.lin2.bias, interaction_energy(reference, energies))
    return potential


def rattled(path: Path) -> None:
    """Ten lattices of 8 molecules, shaken and labelled, for a trial."""
    images = [lattice(8, seed) for seed in range(10)]
    for seed, atoms in enumerate(images):
        atoms.rattle(0.05, seed=seed)
    write(path, labelled(AtomsBatch.from_atoms(images), Water(), 300.0, "a trial"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", nargs="?", help="frames, as water_train.xyz")
    parser.add_argument("--test", help="frames to tell errors of")
    parser.add_argument("--output", default="water_schnet.pt", help="checkpoint to write (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=50, help="the first ones of the file (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=32, help="of the network (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="frames in one step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps, on frames of its own if none are given")
    args = parser.parse_args()
    if args.quick:
        args.minutes = 0.01
        if args.train is None:
            args.train = "water_trial.xyz"
            rattled(Path(args.train))
    if args.train is None:
        sys.exit("name a file of frames, as make_water.py writes them")
    torch.set_num_threads(1)
    keep_freed_memory()
    reference = read_reference(f"{args.train}@:{args.frames}")
    print(f"Reference: {reference.source}")
    potential = built(reference, args.channels, args.seed)
    options = PretrainOptions(max_time_min=args.minutes, batch_size=args.batch, patience=30, seed=args.seed)
    training = Pretraining(potential, reference, options)

    def report(record):
        if record["epoch"] % 10 == 0:
            print(f"epoch {record['epoch']}, validation force MAE {1000 * record['force_mae_eV_per_A']:.1f} meV/Å", flush=True)

    pretrain(training, report)
    save_potential(potential, args.output)
    print(f"{args.output}: best of {training.epoch} epochs at {training.best_epoch}, {training.seconds / 60:.1f} minutes")
    if args.test:
        errors = qm_errors(potential, LabelledFrames.from_reference(read_reference(args.test)))
        energy = 1000 * errors.energy_mae_offset_removed_eV
        print(f"on {args.test}: force MAE {1000 * errors.force_mae_eV_per_A:.1f} meV/Å, energy MAE {energy:.1f} meV")


if __name__ == "__main__":
    main()
