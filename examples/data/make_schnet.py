#!/usr/bin/env python
"""Train a SchNet of a size of your choice on energies and forces; `stabie-ase pretrain` makes one of 3 interactions and 64 channels.

    python examples/data/make_schnet.py --ref train.xyz --output model.pt --device cuda --max-time 10
    python examples/data/make_schnet.py --ref water_train.xyz@:50 --interactions 3 --batch-size 2 --patience 8 --output water.pt

Frames of a liquid hold many forces, so that few of them make a step; with a short patience the learning rate falls within the time.
"""

import argparse

import torch
from torch import nn

from stabie_ase.potentials.checkpoint import save_potential
from stabie_ase.potentials.schnet import SchNetPotential
from stabie_ase.structures.reference import interaction_energy, read_reference, reference_energies
from stabie_ase.system.allocator import keep_freed_memory
from stabie_ase.training.labels import LabelledFrames, QMLoss, qm_errors
from stabie_ase.training.pretrain import Pretraining, pretrain
from stabie_ase.training.pretrain_options import PretrainOptions


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ref", required=True, metavar="FILE", help="frames with energies and forces")
    parser.add_argument("--valid", metavar="FILE", help="frames that errors are told on at the end")
    parser.add_argument("--output", required=True, metavar="MODEL")
    parser.add_argument("--interactions", type=int, default=6)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--cutoff", type=float, default=5.0, metavar="Å")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--patience", type=int, default=50, help="epochs without a better validation error before the learning rate falls")
    parser.add_argument("--offset-weight", type=float, default=1.0, help="of what the energy errors of all atoms have in common (QMLoss)")
    parser.add_argument("--epochs", type=int, default=5000, help="at most")
    parser.add_argument("--max-time", type=float, default=60.0, metavar="MIN")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = parsed()
    torch.set_num_threads(1)  # systems this small gain nothing from more
    keep_freed_memory()
    reference = read_reference(args.ref)
    torch.manual_seed(args.seed)
    energies = reference_energies(reference)
    potential = SchNetPotential.build(energies, args.channels, args.channels, args.interactions, cutoff=args.cutoff)
    nn.init.constant_(potential.network.lin2.bias, interaction_energy(reference, energies))
    times = {"epochs": args.epochs, "max_time_min": args.max_time, "patience": args.patience}
    options = PretrainOptions(batch_size=args.batch_size, seed=args.seed, **times)
    training = Pretraining(potential.to(args.device), reference, options, QMLoss(offset_weight=args.offset_weight))

    def tell(record):
        if record["epoch"] % 50 == 0:
            print(f"epoch {record['epoch']}, validation force MAE {1000 * record['force_mae_eV_per_A']:.1f} meV/Å", flush=True)

    pretrain(training, tell)
    save_potential(potential, args.output)
    print(f"{training.epoch} epochs, best {training.best_epoch}, {training.seconds:.0f} s")
    if args.valid:
        errors = qm_errors(potential, LabelledFrames.from_reference(read_reference(args.valid), potential.device))
        print(f"{args.valid}: force MAE {1000 * errors.force_mae_eV_per_A:.1f} meV/Å, energy MAE "
              f"{1000 * errors.energy_mae_offset_removed_eV:.1f} meV")


if __name__ == "__main__":
    main()
