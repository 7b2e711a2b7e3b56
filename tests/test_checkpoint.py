"""Checkpoints: written whole, read without running what is in them, and open in the family's own code."""

import copy
import io
import logging
import os
import pickle
import pickletools
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import tiny
import torch
from ase.io import write
from helpers import METHANOL, WATER, crystal, predict, schnet
from torch import nn
from torch_geometric.nn.models import SchNet

from stabie_ase.potentials import checkpoint
from stabie_ase.potentials.analytic import LennardJones
from stabie_ase.potentials.checkpoint import CheckpointError, load_potential, read, save_potential
from stabie_ase.potentials.mace import MACEPotential, load_default_kept
from stabie_ase.potentials.schnet import SchNetPotential

pytestmark = pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")


class Evil:
    """Pickles as a call of os.system."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def evil(tmp_path):
    """An object whose unpickling leaves a file behind; at the end the file must not be there."""
    marker = tmp_path / "it-ran"
    yield Evil(marker)
    assert not marker.exists(), "code in a checkpoint was run"


# --- SchNet -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_schnet_comes_back_as_it_was(tmp_path, dtype):
    potential = schnet(dtype, cutoff=4.3)
    save_potential(potential, tmp_path / "model.pt")
    back = load_potential(tmp_path / "model.pt")
    assert isinstance(back, SchNetPotential) and back.dtype == dtype
    assert back.cutoff == potential.cutoff and back.numbers == potential.numbers
    for a, b in zip(predict(potential, METHANOL)[:2], predict(back, METHANOL)[:2]):
        assert torch.equal(a, b)


def test_precision_can_be_chosen_when_loading(tmp_path):
    save_potential(schnet(torch.float32), tmp_path / "model.pt")
    for dtype in (torch.float64, "float64"):
        assert load_potential(tmp_path / "model.pt", dtype=dtype).dtype == torch.float64


@pytest.mark.parametrize("how", ["state dict", "module"])
@pytest.mark.parametrize("atomref", [None, torch.linspace(-2, 2, 100)[:, None]])
def test_torch_geometric_schnet_is_recognised(tmp_path, how, atomref):
    network = SchNet(
        hidden_channels=16, num_filters=12, num_interactions=2, num_gaussians=9, cutoff=4.2, atomref=atomref
    ).double()
    torch.save(network.state_dict() if how == "state dict" else network, tmp_path / "net.pt")
    back = load_potential(tmp_path / "net.pt")
    assert back.cutoff == 4.2 and back.numbers is None
    expected = predict(SchNetPotential(network), METHANOL)
    assert torch.allclose(predict(back, METHANOL).forces, expected.forces, rtol=1e-12)
    network.load_state_dict(back.network.state_dict())  # and its weights go back


@pytest.mark.parametrize("settings", [{}, {"mean": -4.0, "std": 2.0}])
def test_what_a_bare_state_dict_leaves_open_is_told(tmp_path, caplog, settings):
    """And nothing is told of files that leave nothing open."""
    network = SchNet(hidden_channels=16, num_filters=12, num_interactions=2, num_gaussians=9, cutoff=4.2, **settings)
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    torch.save(network, tmp_path / "whole.pt")
    load_potential(tmp_path / "bare.pt")
    (told,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert all(word in told for word in ("mean=None", "std=None", "readout='add'", "4.2 Å", "torch.save(network, file)"))
    caplog.clear()
    whole = load_potential(tmp_path / "whole.pt")
    save_potential(whole, tmp_path / "own.pt")
    expected = float(predict(SchNetPotential(network), METHANOL).energies)
    for potential in (whole, load_potential(tmp_path / "own.pt")):
        assert float(predict(potential, METHANOL).energies) == pytest.approx(expected, rel=1e-6)
    assert not caplog.records


def test_commands_tell_it_in_one_line(tmp_path):
    torch.save(schnet().network.state_dict(), tmp_path / "bare.pt")
    write(tmp_path / "start.xyz", METHANOL)
    result = tiny.run("md", tmp_path / "bare.pt", "--start", tmp_path / "start.xyz", "--time", 0.001, "--temperature", 10,
                      "--output", tmp_path / "run")  # fmt: skip
    assert result.exit_code == 0 and len([line for line in result.stderr.splitlines() if "readout" in line]) == 1


def test_schnet_file_of_a_later_version_is_refused(tmp_path):
    save_potential(schnet(), tmp_path / "model.pt")
    data = read(tmp_path / "model.pt") | {"version": 99}
    torch.save(data, tmp_path / "later.pt")
    with pytest.raises(CheckpointError, match="version 99, this package reads version 1"):
        load_potential(tmp_path / "later.pt")


# --- writing ----------------------------------------------------------------------------------------------------------


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_potential(schnet(seed=1), path)
    before = path.read_bytes()

    def torn(data, file):
        file.write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", torn)
    with pytest.raises(OSError, match="no space"):
        save_potential(schnet(seed=2), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]


def test_file_is_replaced_whole(tmp_path):
    """Whoever has the old file open goes on reading the old one."""
    path = tmp_path / "model.pt"
    save_potential(schnet(seed=1), path)
    before = path.read_bytes()
    with open(path, "rb") as reader:
        save_potential(schnet(seed=2), path)
        assert reader.read() == before != path.read_bytes()


def test_potential_without_a_file_format_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="LennardJones has no file format .* schnet, mace"):
        save_potential(LennardJones(), tmp_path / "model.pt")


# --- files that are no checkpoints ------------------------------------------------------------------------------------


def torchscript(path):
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.trace(nn.Linear(2, 1), torch.ones(1, 2)), path)


def cut(path, keep):
    buffer = io.BytesIO()
    torch.save({"weights": torch.ones(1000)}, buffer)
    path.write_bytes(buffer.getvalue()[:keep])


def plain_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "not a file"),
        (lambda p: p.write_bytes(b""), "the file is empty"),
        (lambda p: p.write_text("positions 0 0 0"), "not a torch checkpoint"),
        (lambda p: p.write_bytes(b"\x80\x02}q\x00."), "not a torch checkpoint"),
        (lambda p: cut(p, 2000), "cut short or damaged"),
        (lambda p: cut(p, 3), "cut short or damaged"),
        (plain_zip, "not one that torch.save wrote"),
        (torchscript, "TorchScript archive"),
        (lambda p: torch.save({"epoch": 3, "weights": torch.ones(2)}, p), "keys epoch, weights, which is no family"),
        (lambda p: torch.save([1, 2], p), "object of type list, which is no family known here. Known: SchNet .*; MACE"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, write, message):
    path = tmp_path / "model.pt"
    write(path)
    for trust in (False, True):
        with pytest.raises(CheckpointError, match=message) as error:
            load_potential(path, trust=trust)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        if "not a torch checkpoint" in message:
            break  # trusted, it is a pickle like any other, with an error of its own


def test_missing_weight_is_named(tmp_path):
    save_potential(schnet(), tmp_path / "model.pt")
    data = read(tmp_path / "model.pt")
    del data["state_dict"]["lin1.bias"]
    torch.save(data, tmp_path / "less.pt")
    with pytest.raises(CheckpointError, match="could not be rebuilt"):
        load_potential(tmp_path / "less.pt")


def test_device_and_head_arguments(tmp_path):
    save_potential(schnet(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="no head 'a'; it has a single output"):
        load_potential(tmp_path / "model.pt", head="a")


# --- files that would run code ----------------------------------------------------------------------------------------


def refuses(path):
    with pytest.raises(CheckpointError, match=r"(posix|nt)\.system.*--trust-checkpoint"):
        load_potential(path)


def test_code_at_the_top_of_a_file_is_not_run(tmp_path, evil):
    torch.save(evil, tmp_path / "model.pt")
    refuses(tmp_path / "model.pt")


def test_code_beside_weights_is_not_run(tmp_path, evil):
    save_potential(schnet(), tmp_path / "good.pt")
    torch.save(read(tmp_path / "good.pt") | {"note": evil}, tmp_path / "model.pt")
    refuses(tmp_path / "model.pt")


def test_code_in_torch_s_old_format_is_not_run(tmp_path, evil):
    torch.save({"note": evil}, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="--trust-checkpoint"):
        load_potential(tmp_path / "model.pt")


def test_plain_tensors_in_torch_s_old_format_are_read(tmp_path):
    potential = schnet()
    torch.save(potential.network.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_potential(tmp_path / "old.pt").cutoff == potential.cutoff


def test_code_in_a_bare_pickle_is_not_run(tmp_path, evil):
    (tmp_path / "model.pt").write_bytes(pickle.dumps(evil, protocol=2))
    with pytest.raises(CheckpointError, match="--trust-checkpoint"):
        load_potential(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.exec", "os.system", "torch.load", "torch._utils.sys"])
def test_names_are_not_looked_up(tmp_path, name):
    """A pickle that only mentions a dangerous name is refused at the name."""
    module, _, attribute = name.rpartition(".")

    class Mention:
        def __reduce__(self):
            return OrderedDict, ()

    buffer = io.BytesIO()
    torch.save(Mention(), buffer)
    wanted = f"c{module}\n{attribute}".encode()
    forged = repack(buffer.getvalue(), lambda data: data.replace(b"ccollections\nOrderedDict", wanted))
    (tmp_path / "model.pt").write_bytes(forged)
    with pytest.raises(CheckpointError, match=f"asks for {name}"):
        load_potential(tmp_path / "model.pt")


def repack(archive: bytes, edit) -> bytes:
    """A torch archive with its pickle edited."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, edit(data) if name.endswith("data.pkl") else data)
    return out.getvalue()


def test_trust_runs_the_code_and_says_what_came_of_it(tmp_path):
    marker = tmp_path / "it-ran"
    torch.save(Evil(marker), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="object of type int"):
        load_potential(tmp_path / "model.pt", trust=True)
    assert marker.exists()


# --- MACE -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build():
    """Makes MACE models with spread-out weights; quiet."""
    pytest.importorskip("mace")
    from test_potentials import build_mace

    logging.disable(logging.WARNING)
    yield build_mace
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def model_file(build, tmp_path_factory):
    """A saved float64 MACE and the network itself."""
    network = build()
    path = tmp_path_factory.mktemp("mace") / "aspirin.model"
    torch.save(network, path)
    return path, network


def ase_energy(path, atoms, **options):
    from mace.calculators import MACECalculator

    atoms = atoms.copy()
    atoms.calc = MACECalculator(str(path), **options)
    return atoms.get_potential_energy()


def settings(**names):
    """Arguments for a MACE, with irreps and classes from their names."""
    from e3nn import o3
    from mace import modules

    made = {name: o3.Irreps(names[name]) for name in ("hidden_irreps", "MLP_irreps", "edge_irreps") if name in names}
    if "readout_cls" in names:
        made["readout_cls"] = getattr(modules.blocks, names["readout_cls"])
    return names | made


VARIANTS = {
    "foundation-like": {
        "first": "RealAgnosticDensityInteractionBlock", "distance_transform": "Agnesi", "pair_repulsion": True,
        "correlation": 3, "max_ell": 1, "num_polynomial_cutoff": 6,
    },
    "heads": {
        "heads": ["dft", "Default"], "atomic_energies": np.array([[-13.0, -1029.0, -2041.0], [-14.0, -1030.0, -2.0]]),
        "atomic_inter_scale": [5.0, 3.0], "atomic_inter_shift": [0.1, 0.0], "distance_transform": "Soft",
    },
    "non-linear": {
        "max_ell": 1, "first": "RealAgnosticResidualNonLinearInteractionBlock", "apply_cutoff": False,
        "radial_type": "gaussian", "readout_cls": "NonLinearBiasReadoutBlock",
    },
    "one layer": {
        "num_interactions": 1, "gate": None, "first": "RealAgnosticAttResidualInteractionBlock", "use_so3": True,
        "hidden_irreps": "4x0e + 4x1e",
    },
    "three layers": {
        "num_interactions": 3, "max_ell": 1, "correlation": [3, 1, 2], "gate": torch.tanh,
        "keep_last_layer_irreps": True, "edge_irreps": "2x0e + 2x1o", "use_edge_irreps_first": True,
    },
    "both parities": {
        "hidden_irreps": "4x0e + 4x0o + 4x1o", "max_ell": 1, "gate": torch.abs, "use_last_readout_only": True,
        "use_agnostic_product": True, "avg_num_neighbors": np.float64(7.25),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "variant, dtype", [*((variant, torch.float64) for variant in VARIANTS), ("foundation-like", torch.float32)]
)
def test_mace_is_rebuilt_without_running_its_pickle(tmp_path, build, variant, dtype):
    network = build(dtype=dtype, **settings(**VARIANTS[variant]))
    torch.save(network, tmp_path / "m.model")
    back = load_potential(tmp_path / "m.model")
    assert back.dtype == dtype
    fixed = {name for name, p in network.named_parameters() if not p.requires_grad}  # zeros for couplings that vanish
    assert {name for name, p in back.network.named_parameters() if not p.requires_grad} == fixed
    expected = predict(MACEPotential(network), [METHANOL, crystal()])
    found = predict(back, [METHANOL, crystal()])
    eps = torch.finfo(dtype).eps
    size = float(expected.forces.abs().max())
    assert size > 1e-2
    assert torch.allclose(found.energies, expected.energies, rtol=20 * eps, atol=0)
    assert torch.allclose(found.forces, expected.forces, rtol=0, atol=200 * eps * size)


def test_plain_mace_class_is_rebuilt(tmp_path, build):
    network = build("MACE", num_interactions=1)
    torch.save(network, tmp_path / "m.model")
    back = load_potential(tmp_path / "m.model")
    assert type(back.network).__name__ == "MACE"
    assert torch.equal(predict(back, WATER).energies, predict(MACEPotential(network), WATER).energies)


@pytest.mark.parametrize("saved", ["adopted", "rebuilt and frozen"])
def test_saved_mace_opens_in_its_own_calculator(tmp_path, model_file, saved):
    path, network = model_file
    potential = MACEPotential(copy.deepcopy(network)) if saved == "adopted" else load_potential(path)
    with torch.no_grad():
        potential.network.readouts[0].linear.weight.add_(0.1)
    if saved != "adopted":
        potential.requires_grad_(False)
    save_potential(potential, tmp_path / "tuned.model")
    expected = float(predict(potential, WATER).energies)
    assert ase_energy(tmp_path / "tuned.model", WATER) == pytest.approx(expected, rel=1e-14)
    back = torch.load(tmp_path / "tuned.model", weights_only=False)
    assert all(p.requires_grad and p.device.type == "cpu" for p in back.parameters())
    assert all(p.requires_grad == (saved == "adopted") for p in potential.parameters()), "the potential was changed"


def test_couplings_of_another_basis_are_accepted(tmp_path, build):
    """A model made with cuequivariance has fewer couplings per order; such a file is imitated by dropping some."""
    network = build(correlation=3, num_interactions=1)
    for contraction in (c for p in network.products for c in p.symmetric_contractions.contractions):
        for order, weight in ((3, contraction.weights_max), (2, contraction.weights[0])):
            couplings = getattr(contraction, f"U_matrix_{order}")
            keep = couplings.shape[-1] - 1
            setattr(contraction, f"U_matrix_{order}", couplings[..., :keep].contiguous())
            weight.data = weight.data[:, :keep].contiguous()
    torch.save(network, tmp_path / "m.model")
    back = load_potential(tmp_path / "m.model")
    expected = predict(MACEPotential(network), METHANOL)
    assert torch.allclose(predict(back, METHANOL).forces, expected.forces, atol=1e-12)


def test_parts_that_older_versions_saved_and_never_read_are_dropped(tmp_path, build):
    network = build(num_interactions=1, pair_repulsion=True)
    expected = predict(MACEPotential(network), WATER).energies
    network.pair_repulsion_fn.register_buffer("r_max", torch.tensor(9.0))
    network.pair_repulsion_fn.cutoff = copy.deepcopy(network.radial_embedding.cutoff_fn)
    torch.save(network, tmp_path / "m.model")
    assert torch.equal(predict(load_potential(tmp_path / "m.model"), WATER).energies, expected)


def test_code_hidden_in_a_mace_is_not_run(tmp_path, build, evil):
    network = build(num_interactions=1)
    network.products[0].linear.note = evil
    torch.save(network, tmp_path / "m.model")
    refuses(tmp_path / "m.model")


def test_code_text_of_fx_modules_is_never_run(tmp_path, model_file):
    path, network = model_file
    marker = tmp_path / "it-ran"
    planted = f"\nimport os; os.system('touch {marker}')".encode()

    def plant(data: bytes) -> bytes:
        """Put our line before the code of every fx module; a text is an opcode, four bytes of length and itself."""
        texts = [(at, len(text.encode())) for op, text, at in pickletools.genops(data)
                 if op.name == "BINUNICODE" and text.startswith("\n\n\ndef forward(")]  # fmt: skip
        assert texts, "no code of an fx module found"
        for at, length in reversed(texts):
            longer = (length + len(planted)).to_bytes(4, "little")
            data = data[: at + 1] + longer + planted + data[at + 5 :]
        return data

    forged = tmp_path / "forged.model"
    forged.write_bytes(repack(path.read_bytes(), plant))
    back = load_potential(forged)
    assert torch.allclose(predict(back, WATER).energies, predict(MACEPotential(network), WATER).energies, rtol=1e-14)
    assert not marker.exists(), "the planted code was run"
    # The plant works: whoever trusts the file gets it.
    torch.load(forged, weights_only=False)
    assert marker.exists()


def test_unknown_kind_of_mace_is_named(tmp_path, build):
    specs = {"total_charge": {"type": "continuous", "in_dim": 1, "emb_dim": 4, "per": "graph"}}
    torch.save(build(num_interactions=1, embedding_specs=specs), tmp_path / "m.model")
    with pytest.raises(CheckpointError, match="mace.modules.embeddings.GenericJointEmbedding.*--trust-checkpoint"):
        load_potential(tmp_path / "m.model")
    with pytest.raises(CheckpointError, match="total charge or spin"):
        load_potential(tmp_path / "m.model", trust=True)


def test_setting_that_is_not_understood_is_an_error(tmp_path, build):
    network = build(num_interactions=1)
    network.radial_embedding.out_dim = 7
    torch.save(network, tmp_path / "m.model")
    with pytest.raises(CheckpointError, match="could not be rebuilt"):
        load_potential(tmp_path / "m.model")
    network.radial_embedding.out_dim = 5
    network.products[0].symmetric_contractions.contractions[0].num_features = 3
    torch.save(network, tmp_path / "m.model")
    with pytest.raises(CheckpointError, match="settings not understood: .*num_features is 4 .* and 3"):
        load_potential(tmp_path / "m.model")


def test_trusted_mace_and_its_head(tmp_path, build):
    energies = np.array([[-13.0, -1029.0, -2041.0], [-14.0, -1030.0, -2043.0]])
    network = build(
        num_interactions=1, heads=["dft", "cc"], atomic_energies=energies, atomic_inter_scale=[1.0, 2.0],
        atomic_inter_shift=[0.0, 0.0],
    )  # fmt: skip
    torch.save(network, tmp_path / "m.model")
    for trust in (False, True):
        potential = load_potential(tmp_path / "m.model", trust=trust, head="cc")
        expected = ase_energy(tmp_path / "m.model", WATER, head="cc")
        assert float(predict(potential, WATER).energies) == pytest.approx(expected, rel=1e-13)
        with pytest.raises(ValueError, match="no head 'mp2'; it has dft, cc"):
            load_potential(tmp_path / "m.model", trust=trust, head="mp2")
        with pytest.raises(CheckpointError, match="several heads.*dft, cc"):
            load_potential(tmp_path / "m.model", trust=trust)


def test_loading_leaves_the_process_as_it_was(model_file):
    path, _ = model_file
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    torch.set_default_dtype(torch.float32)
    load_potential(path)
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1]) and random.getstate() == generators[2]


# --- what an import does to the process -------------------------------------------------------------------------------


def run_python(code: str, *arguments) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], env=environment)
    assert done.returncode == 0


def test_families_are_imported_late_and_reading_stays_restricted(tmp_path, build):
    """`import mace` makes plain torch.load run everything; ours must not, and must take that back."""
    path = tmp_path / "m.model"
    torch.save(build(num_interactions=1), path)
    marker = tmp_path / "it-ran"
    torch.save({"format": "stabie_ase.schnet", "note": Evil(marker)}, tmp_path / "evil.pt")
    code = """
import os, sys
from stabie_ase.potentials.checkpoint import CheckpointError, load_potential
import stabie_ase.potentials.calculator
assert not {"mace", "e3nn", "torch_geometric"} & set(sys.modules)
load_potential(sys.argv[1])
assert "mace" in sys.modules and "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
try:
    load_potential(sys.argv[2])
    sys.exit("not refused")
except CheckpointError:
    pass
"""
    run_python(code, path, tmp_path / "evil.pt")
    assert not marker.exists()


def test_the_user_s_own_setting_is_kept(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    with load_default_kept():
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # as `import mace` does
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "0"
