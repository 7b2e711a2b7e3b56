"""Files are written whole, whatever happens meanwhile."""

import os
import signal
import threading

import pytest
import torch

from stabie_ase.system.files import uninterrupted, write_atomically


@pytest.fixture(autouse=True)
def sigint_raises():
    """A shell that starts its jobs in the background has them ignore ctrl-C, and the tests with them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("written")
        done.append("gone on")
    assert done == ["written"]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_the_outermost_block():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
        done.append("written")
    assert done == ["written"]


def test_an_error_in_the_block_passes():
    with pytest.raises(ValueError, match="own"), uninterrupted():
        raise ValueError("own")


def test_ctrl_c_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_write_too(tmp_path):
    thread = threading.Thread(target=write_atomically, args=(1, tmp_path / "x"))
    thread.start()
    thread.join()
    assert torch.load(tmp_path / "x") == 1


class CtrlC:
    """Arrives while it is pickled."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGINT)
        return int, (7,)


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_atomically([torch.ones(3), CtrlC()], tmp_path / "x.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    assert torch.load(tmp_path / "x.pt", weights_only=False)[1] == 7


def test_an_error_leaves_the_old_file_alone(tmp_path):
    write_atomically("old", tmp_path / "x.pt")
    with pytest.raises(Exception, match="pickle"):
        write_atomically(lambda: None, tmp_path / "x.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"] and torch.load(tmp_path / "x.pt") == "old"
