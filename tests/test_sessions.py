"""Work in several sessions: interrupted, ended from outside, gone on with - what is told, and what is kept."""

import sys
import time

import pytest
import tiny

import stabie_ase.training.pretrain as pretrain_module
from stabie_ase.cli.progress import Progress
from stabie_ase.training.stabie import StabieTraining

FINETUNE = ("finetune", "model.pt", "--ref", "ref.xyz", "--output", "run")
MD = ("md", "model.pt", "--start", "ref.xyz", "--replicas", "2", "--output", "run")
PRETRAIN = ("pretrain", "--model", "schnet", "--ref", "ref.xyz", "-o", "new.pt", "--batch-size", "40")


@pytest.fixture(autouse=True)
def small_builder(monkeypatch):
    """Pretraining in this process builds the tiny SchNet."""
    monkeypatch.setitem(pretrain_module.BUILDERS, "schnet", lambda reference: tiny.new_schnet(elements=reference))


def interrupt_after(monkeypatch, n, owner, name):
    """A ctrl-C in place of one call of a method after n of them."""
    real, calls = getattr(owner, name), []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == n + 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("terminal", [False, True])
def test_time_left_goes_by_the_speed_of_this_session(capsys, monkeypatch, terminal):
    """60 of 100 units were used before; 10 more take 20 s, so that 30 more take 60 s."""
    clock = [1000.0]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with Progress(100.0, "work", done=60.0, every=0.0) as progress:
        progress.show(60.0, "begun")
        clock[0] += 20.0
        progress.show(70.0, "under way")
    text = capsys.readouterr().err
    assert ("00:20, 01:00 left" in text) if terminal else ("work: 70 % after 20 s, 60 s left; under way" in text)
    assert "60 %" in text or "60%" in text


def test_resumed_work_tells_what_was_used_before(here, monkeypatch):
    """Of finetune, md and pretrain: the part of the budget that the first session used is where the second begins."""
    told, real = {}, Progress.__init__

    def spy(self, total, title, quiet=False, done=0.0, **settings):
        told[title] = done / total
        real(self, total, title, quiet, done, **settings)

    monkeypatch.setattr(Progress, "__init__", spy)
    assert tiny.run(*MD, "--output", "md", "--time", "0.02").exit_code == 0 and told["md"] == 0.0
    assert tiny.run("md", "--resume", "md", "--time", "0.05").exit_code == 0 and told["md"] == pytest.approx(0.4)

    interrupt_after(monkeypatch, 3, pretrain_module.Pretraining, "run_epoch")
    monkeypatch.setattr("stabie_ase.cli.pretrain.SAVE_EVERY", -1.0)
    assert tiny.run(*PRETRAIN, "--epochs", "6").exit_code == 130 and told["pretrain"] == 0.0
    assert tiny.run(*PRETRAIN, "--epochs", "6").exit_code == 0 and told["pretrain"] == pytest.approx(0.5)

    interrupt_after(monkeypatch, 3, StabieTraining, "step")
    assert tiny.run(*FINETUNE, *tiny.flags(max_updates=4)).exit_code == 130 and told["stabie"] == 0.0
    assert tiny.run("finetune", "--resume", "run").exit_code == 0 and 0.0 < told["stabie"] < 1.0
