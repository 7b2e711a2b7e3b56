"""Work in several sessions: interrupted, ended from outside, gone on with - what is told, and what is kept."""

import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch

import stabie_ase.runs.md as production_module
import stabie_ase.training.pretrain as pretrain_module
from stabie_ase.cli import log as log_module
from stabie_ase.cli.progress import ProgressBar
from stabie_ase.training.loop import TrainingLoop

FINETUNE = ("finetune", "model.pt", "--ref", "ref.xyz", "--output", "run")
MD = ("md", "model.pt", "--start", "ref.xyz", "--replicas", "2", "--output", "run")
PRETRAIN = ("pretrain", "--model", "schnet", "--ref", "ref.xyz", "-o", "new.pt", "--batch-size", "40")


@pytest.fixture(autouse=True)
def small_builder(monkeypatch):
    """Pretraining in this process builds the tiny SchNet."""
    tiny.small_builder(monkeypatch)


def interrupt_after(monkeypatch, n, owner, name):
    """A ctrl-C in place of one call of a method after n of them."""
    real, calls = getattr(owner, name), []

    def interrupted(*arguments, **settings):
        calls.append(None)
        if len(calls) == n + 1:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("terminal", [False, True])
def test_time_left_goes_by_the_speed_of_this_session(capsys, monkeypatch, terminal):
    """60 of 100 units were used before; 10 more take 20 s, so that 30 more take 60 s."""
    clock = [1000.0]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with ProgressBar(100.0, "work", done=60.0, every=0.0) as progress:
        progress.show(60.0, "begun")
        clock[0] += 20.0
        progress.show(70.0, "under way")
    text = capsys.readouterr().err
    assert ("00:20, 01:00 left" in text) if terminal else ("work: 70 % after 20 s, 60 s left; under way" in text)
    assert "60 %" in text or "60%" in text


def test_resumed_work_tells_what_was_used_before(here, monkeypatch):
    """Of finetune, md and pretrain: the part of the budget that the first session used is where the second begins."""
    told, real = {}, ProgressBar.__init__

    def spy(self, total, title, quiet=False, done=0.0, **settings):
        told[title] = done / total
        real(self, total, title, quiet, done, **settings)

    monkeypatch.setattr(ProgressBar, "__init__", spy)
    assert tiny.run(*MD[:-1], "md", "--time", "0.02").exit_code == 0 and told["md"] == 0.0
    assert tiny.run("md", "--resume", "md", "--time", "0.05").exit_code == 0 and told["md"] == pytest.approx(0.4)

    interrupt_after(monkeypatch, 3, pretrain_module.Pretraining, "run_epoch")
    monkeypatch.setattr("stabie_ase.runs.pretrain.SAVE_EVERY", -1.0)
    assert tiny.run(*PRETRAIN, "--epochs", "6").exit_code == 130 and told["pretrain"] == 0.0
    assert tiny.run(*PRETRAIN, "--epochs", "6").exit_code == 0 and told["pretrain"] == pytest.approx(0.5)

    interrupt_after(monkeypatch, 3, TrainingLoop, "step")
    assert tiny.run(*FINETUNE, *tiny.flags(max_updates=4)).exit_code == 130 and told["stabie"] == 0.0
    assert tiny.run("finetune", "--resume", "run").exit_code == 0 and 0.0 < told["stabie"] < 1.0


# -- SIGTERM, as batch systems send it


STARTED = {
    "finetune": ([*FINETUNE, *tiny.flags(max_cycles=400)], "run/metrics.jsonl", "go on with: stabie-ase finetune --resume run"),
    "md": ([*MD, "--time", "1000"], "run/state.pt", "go on with: stabie-ase md --resume run"),
    "pretrain": ([*PRETRAIN, "--epochs", "100000"], "new.pt.pretrain/state.pt", "the same command goes on from new.pt.pretrain"),
}


@pytest.mark.parametrize("command", STARTED)
def test_sigterm_ends_as_ctrl_c_does(here, command):
    arguments, written, onwards = STARTED[command]
    process = tiny.Process(here, *arguments)
    process.wait_for((here / written).exists)
    assert process.interrupt(signal.SIGTERM) == 143
    assert process.stderr.splitlines()[-1] == f"terminated; {onwards}" and "Traceback" not in process.stderr


def test_sigterm_before_anything_was_written(here, monkeypatch):
    monkeypatch.setattr("stabie_ase.runs.md.read_frames", lambda path: os.kill(os.getpid(), signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    result = tiny.run(*MD)
    assert result.exit_code == 143 and result.stderr.strip() == "terminated"
    assert signal.getsignal(signal.SIGTERM) == handler and not (here / "run").exists()


def test_sigterm_that_is_ignored_stays_ignored(here):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert tiny.run(*MD, "--time", "0.001").exit_code == 0 and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


SLOW = """
import os, signal
from stabie_ase.cli.main import main
from stabie_ase.system.files import uninterrupted

@main.command()
def slow():
    try:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            print("written", flush=True)
            {inside}
        print("gone on")
    finally:
        {after}
        print("cleaned up", flush=True)

main(["slow"])
"""


@pytest.mark.parametrize("inside, after, status, printed", [
    ("pass", "pass", 143, "written cleaned up"),
    ("os.kill(os.getpid(), signal.SIGTERM)", "pass", -signal.SIGTERM, "written"),
    ("pass", "os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, "written"),
])  # fmt: skip
def test_the_first_sigterm_waits_for_files_and_a_second_for_nothing(inside, after, status, printed):
    done = subprocess.run([sys.executable, "-c", SLOW.format(inside=inside, after=after)], capture_output=True, text=True)
    assert done.returncode == status and done.stdout.split() == printed.split(), done.stderr


def test_an_interrupted_md_keeps_all_its_frames(here, monkeypatch):
    """Also those since the state was saved last."""
    interrupt_after(monkeypatch, 4, production_module, "watched")
    assert tiny.run(*MD, "--time", "0.1", "--sample-every", "10").exit_code == 130
    assert torch.load(here / "run" / "state.pt", weights_only=True)["state"]["done"] == 80
    lines = (here / "run" / "thermo.csv").read_text()
    assert len(lines.splitlines()) == 1 + 2 * 5
    assert tiny.run("md", "--resume", "run").exit_code == 0
    assert (here / "run" / "thermo.csv").read_text().startswith(lines)


# -- log.txt


def logged(folder):
    """What the log tells, each line's time taken off."""
    lines = (folder / "log.txt").read_text().splitlines()
    times, texts = zip(*(re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)", line).groups() for line in lines))
    assert list(times) == sorted(times)
    return list(texts)


def printed(result):
    return [line for line in result.output.splitlines() if line.strip()]


def test_the_log_of_md_tells_what_was_printed_over_all_sessions(here):
    """Also what was said before there was a directory; what is refused leaves the log alone."""
    begun = tiny.run(*MD, "--time", "0.02", "--timestep", "8")
    assert "a time step of 8 fs is long" in begun.output
    first = logged(here / "run")
    assert first[0] == "stabie-ase " + " ".join([*MD, "--time", "0.02", "--timestep", "8"])
    assert sorted(first[1:]) == sorted(printed(begun))
    assert tiny.run("md", "--resume", "run", "--ensemble", "nve").exit_code == 1 and logged(here / "run") == first
    on = tiny.run("md", "--resume", "run", "--time", "0.04")
    both = logged(here / "run")
    assert both[: len(first) + 1] == [*first, "stabie-ase md --resume run --time 0.04"]
    assert sorted(both[len(first) + 1 :]) == sorted(printed(on))


def test_quiet_commands_log_warnings_and_progress(here, monkeypatch):
    real = ProgressBar.__init__
    monkeypatch.setattr(ProgressBar, "__init__", lambda *a, **settings: real(*a, **settings, every=0.0))
    result = tiny.run("-q", *MD, "--time", "0.02", "--timestep", "8", "--sample-every", "8")
    assert len(printed(result)) == 1
    texts = logged(here / "run")
    assert [text for text in texts if text.startswith("md: 50 %")] and any("a time step of 8 fs" in text for text in texts)


def test_the_log_of_finetune_has_every_window_and_the_end(here, monkeypatch):
    interrupt_after(monkeypatch, 2, TrainingLoop, "step")
    broken = tiny.run(*FINETUNE, *tiny.flags(max_updates=2))
    texts = logged(here / "run")
    assert texts[-1].startswith("interrupted; go on with") and printed(broken)[-1] == texts[-1]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    result = tiny.run("finetune", "--resume", "run")
    windows = (here / "run" / "metrics.jsonl").read_text().splitlines()
    texts = logged(here / "run")
    assert len([text for text in texts if re.match(r"cycle \d+ (simulation|learning) \d+: ", text)]) == len(windows)
    assert texts[-3:] == printed(result)[-3:]


def test_an_error_is_logged(here, monkeypatch):
    def broken(*arguments, **settings):
        raise RuntimeError("no more")

    monkeypatch.setattr(production_module, "watched", broken)
    result = tiny.run(*MD)
    assert result.exit_code == 1 and logged(here / "run")[-1] == printed(result)[-1] and "no more" in result.output


def test_a_log_that_cannot_be_written_does_no_harm(capsys):
    with log_module.logging_of("", logging.WARNING):
        file = log_module.ALL.handlers[-1]
        file.open("/dev/full" if os.path.exists("/dev/full") else pytest.skip("no /dev/full"))
        log_module.ALL.warning("beware")
    assert capsys.readouterr().err == "beware\n"


def test_what_is_logged_goes_nowhere_else(here, caplog):
    """A library that has given the root logger a handler would print each line a second time."""
    before = log_module.ALL.handlers, log_module.ALL.level, log_module.ALL.propagate
    result = tiny.run("-v", *MD, "--timestep", "8", "--time", "0.05")
    assert result.exit_code == 0 and result.output.count("a time step of 8 fs is long") == 1
    assert "a time step of 8 fs is long" in (here / "run" / "log.txt").read_text() and not caplog.records
    assert (log_module.ALL.handlers, log_module.ALL.level, log_module.ALL.propagate) == before
