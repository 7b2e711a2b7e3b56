"""Unstable frames in ASE's GUI: the command, its errors, and a real window on a virtual screen."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
from ase import Atoms
from ase.gui.images import Images
from ase.io.trajectory import Trajectory
from PIL import ImageGrab, features

from stabie_ase.runs.report.view import view, view_command


def write_unstable(path, n=3):
    """Water molecules with one bond far too long, as the loop writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Trajectory(path, "w") as frames:
        for k in range(n):
            atoms = Atoms("OH2", [[0, 0, 0], [0, 0.76, 0.59], [0, -0.9 - 0.3 * k, 0.9 + 0.3 * k]], tags=[1, 0, 1])
            atoms.info |= {"cycle": k, "replica": 7, "time_ps": 1.5, "criterion": "bonds", "value": np.inf}
            frames.write(atoms)
    return path


@pytest.fixture
def display(monkeypatch):
    monkeypatch.setenv("DISPLAY", ":77")


def test_command_for_a_run_and_for_a_file(tmp_path, display):
    file = write_unstable(tmp_path / "run" / "unstable.traj")
    expected = [sys.executable, "-m", "ase", "gui", str(file)]
    assert view_command(tmp_path / "run") == expected
    assert view_command(str(file)) == expected


def test_a_relative_path_cannot_be_an_option(tmp_path, display, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_unstable(tmp_path / "-n.traj")
    assert view_command("-n.traj")[-1] == str(tmp_path / "-n.traj")


def test_an_at_sign_in_the_path_does_not_choose_frames(tmp_path, display):
    write_unstable(tmp_path / "me@host" / "unstable.traj")
    argument = view_command(tmp_path / "me@host")[-1]
    images = Images()
    images.read([argument])
    assert len(images) == 3


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p, "does not exist"),
        (lambda p: p.mkdir() or p, "has no unstable.traj: it is no run directory, or no replica has become unstable"),
        (lambda p: p.write_text("x") and p, "neither a run directory nor a .traj file"),
        (lambda p: p.with_suffix(".traj").write_text("x") and p.with_suffix(".traj"), "cannot be read as an ASE traj"),
        (lambda p: p.with_suffix(".traj").touch() or p.with_suffix(".traj"), "holds no frames: no replica has become"),
        (lambda p: write_unstable(p.with_suffix(".traj"), 0), "holds no frames: no replica has become unstable"),
    ],
    ids=["missing", "empty directory", "other file", "damaged", "empty file", "no frames"],
)
def test_nothing_to_see(tmp_path, display, make, message):
    with pytest.raises(ValueError, match=message) as caught:
        view_command(make(tmp_path / "thing"))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="$DISPLAY is for X")
@pytest.mark.skipif(not find_spec("_tkinter"), reason="needs tkinter")
def test_no_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    file = write_unstable(tmp_path / "unstable.traj")
    with pytest.raises(ValueError, match="no display .* copy .*unstable.traj to a machine .* ase gui unstable.traj"):
        view_command(file)


def test_no_tkinter(tmp_path, display, monkeypatch):
    monkeypatch.setitem(sys.modules, "tkinter", None)
    with pytest.raises(ValueError, match="needs tkinter.*python3-tk.*ase gui unstable.traj"):
        view_command(write_unstable(tmp_path / "unstable.traj"))


# -- a real window

needs_screen = pytest.mark.skipif(
    not (shutil.which("Xvfb") and find_spec("_tkinter") and features.check("xcb")),
    reason="needs Xvfb, tkinter and a Pillow that can take screenshots",
)


@pytest.fixture
def screen(monkeypatch):
    """A virtual screen of our own; the server chooses a free number. Left by its last client it would reset, and refuse the next."""
    reading, writing = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-screen", "0", "800x700x24", "-nolisten", "tcp", "-noreset"],
        pass_fds=[writing], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(writing)
    try:
        with os.fdopen(reading) as answer:
            name = f":{answer.readline().strip()}"
        assert name != ":", "Xvfb did not start"
        monkeypatch.setenv("DISPLAY", name)
        yield name
    finally:
        server.terminate()
        server.wait(10)


def screenshot(name):
    return np.asarray(ImageGrab.grab(xdisplay=name).convert("RGB")).astype(int)


def share_of(colour, image):
    return float((np.abs(image - colour).max(axis=2) < 8).mean())


@needs_screen
def test_gui_opens_on_the_unstable_frames(tmp_path, screen):
    write_unstable(tmp_path / "unstable.traj")
    assert np.ptp(screenshot(screen)) == 0  # an empty screen
    process = view(tmp_path)
    try:
        deadline = time.monotonic() + 25
        # The oxygen atom is drawn in Jmol's red.
        while share_of((255, 13, 13), image := screenshot(screen)) < 1e-3:
            assert process.poll() is None, "the GUI has gone"
            assert time.monotonic() < deadline, "no window with a red atom"
            time.sleep(0.2)
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10
    finally:
        process.terminate()
        process.wait(10)
    assert process.returncode == -signal.SIGTERM


COLOUR_BY_TAG = """
import sys
from ase.gui.gui import GUI
from ase.gui.images import Images

images = Images()
images.read(sys.argv[1:])
gui = GUI(images)
for _ in gui.images:
    window = gui.colors_window()
    assert window.radio["tag"].active
    window.toggle("tag")
    print(*gui.get_colors())
    window.win.close()
    gui.step("PageDown")
(view,) = [items for title, items in gui.get_menu_data() if title.replace("_", "") == "View"]
print([item.key for item in view if getattr(item, "label", "") == "Colors ..."])
gui.exit()
"""


@needs_screen
def test_gui_colours_the_atoms_to_blame(tmp_path, screen):
    """What the report tells the user to do: View > Colors ..., By tag."""
    file = write_unstable(tmp_path / "unstable.traj", 2)
    done = subprocess.run(
        [sys.executable, "-c", COLOUR_BY_TAG, str(file)],
        capture_output=True, text=True, timeout=60, env=os.environ | {"LC_ALL": "C", "LANGUAGE": "C"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *colours, key = done.stdout.splitlines()
    for line in colours:
        oxygen, hydrogen, stretched = line.split()
        assert oxygen == stretched != hydrogen
    assert len(colours) == 2 and key == "['C']"
