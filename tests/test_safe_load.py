"""Files: nothing in them is run, a kill leaves a whole file, a URL is checked."""

import argparse
import hashlib
import http.server
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from base import files, safe_load
from base.errors import CorruptFile, UserError


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def test_a_hostile_pickle_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    marker = tmp_path / "ran"
    torch.save({"model": {"w": torch.zeros(1)}, "x": Hostile(marker)}, path)
    with pytest.raises(UserError, match=r"refused.*posix\.system|refused.*nt\.system"):
        safe_load.read_weights_file(path)
    assert not marker.exists()


def test_a_hostile_bare_pickle_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(UserError):
        safe_load.read_weights_file(path)
    assert not (tmp_path / "ran").exists()


def test_an_old_deit_file_with_namespace_and_path_loads(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=0.1, output_dir=pathlib.PosixPath("/checkpoint/x"), data=("a", 1))
    path = tmp_path / "old.pth"
    torch.save({"model": {"w": torch.ones(2)}, "args": args}, path)
    content = safe_load.read_weights_file(path)
    assert content["args"].output_dir == pathlib.PosixPath("/checkpoint/x")
    assert torch.equal(content["model"]["w"], torch.ones(2))


@pytest.mark.parametrize("case", ["missing", "folder", "empty", "text", "cut", "list"])
def test_what_is_no_checkpoint_is_one_line_with_its_name(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    if case == "folder":
        path.mkdir()
    elif case == "empty":
        path.touch()
    elif case == "text":
        path.write_text("hello, I am no checkpoint")
    elif case == "cut":
        torch.save({"w": torch.randn(1000)}, path)
        path.write_bytes(path.read_bytes()[:1500])
    elif case == "list":
        torch.save([1, 2], path)
    with pytest.raises(UserError) as caught:
        safe_load.read_weights_file(path)
    assert "x.pth" in str(caught.value) and "\n" not in caught.value.line()


def test_a_damaged_safetensors_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00garbage garbage")
    with pytest.raises(UserError, match="x.safetensors"):
        safe_load.read_weights_file(path)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A web server on this machine; its address, folder, and how often it was asked."""
    folder = tmp_path / "www"
    folder.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, *args) -> None:
            asked.append(self.path)

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", folder, asked
    httpd.shutdown()


def test_a_url_is_downloaded_once_and_its_hash_is_checked(server) -> None:
    address, folder, asked = server
    torch.save({"model": {"w": torch.ones(3)}}, folder / "a.pth")
    digest = hashlib.sha256((folder / "a.pth").read_bytes()).hexdigest()
    (folder / "a.pth").rename(folder / f"a-{digest[:8]}.pth")
    for _ in range(2):
        content = safe_load.read_weights_file(f"{address}/a-{digest[:8]}.pth")
        assert torch.equal(content["model"]["w"], torch.ones(3))
    assert len(asked) == 1


def test_a_url_with_another_hash_is_refused_and_leaves_nothing(server, tmp_path: Path) -> None:
    address, folder, _ = server
    torch.save({"w": torch.ones(3)}, folder / "a-00000000.pth")
    with pytest.raises(UserError, match="hash"):
        safe_load.read_weights_file(f"{address}/a-00000000.pth")
    assert not list((tmp_path / "hub").rglob("*.pth"))


def test_a_download_that_has_no_place_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hub").touch()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="cannot be downloaded .Not a directory"):
        safe_load.fetch("http://127.0.0.1:9/a-12345678.pth")


def test_a_url_without_a_hash_is_refused_with_a_way_out(server) -> None:
    address, folder, asked = server
    torch.save({"w": torch.ones(3)}, folder / "a.pth")
    with pytest.raises(UserError, match="#sha256="):
        safe_load.read_weights_file(f"{address}/a.pth")
    assert not asked
    digest = files.hash_of(folder / "a.pth")
    assert "w" in safe_load.read_weights_file(f"{address}/a.pth#sha256={digest}")
    with pytest.raises(UserError, match="cannot be downloaded"):
        safe_load.read_weights_file(f"{address}/b-12345678.pth")


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pth"
    files.save_atomically({"a": 1}, path)

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        files.save_atomically({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.pth"]


def test_an_error_that_is_not_the_disks_is_not_called_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(content: object, file: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        files.save_atomically({}, tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


def test_a_text_file_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("one\n", "two\n"):
        files.write_text_atomically(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text() == text
    with pytest.raises(UserError, match="cannot be written"):
        files.write_text_atomically(tmp_path / "a.txt" / "b", "three")


def test_each_write_ages_the_ones_before_and_names_the_best(tmp_path: Path) -> None:
    path, best = tmp_path / "checkpoint.pth", tmp_path / "best_checkpoint.pth"
    for number in range(5):
        copy_to = best if number == 1 else None
        files.save_atomically({"n": number}, path, keep=3, copy_to=copy_to)
    held = {p.name: torch.load(p, weights_only=True)["n"] for p in tmp_path.iterdir()}
    assert held == {
        "checkpoint.pth": 4,
        "checkpoint-1.pth": 3,
        "checkpoint-2.pth": 2,
        "best_checkpoint.pth": 1,
    }


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"w": torch.full((50,), 1.5)}, path)
    content = path.read_bytes()
    place = content.index(torch.full((50,), 1.5).numpy().tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert torch.load(path, weights_only=True)["w"][0] != 1.5, "torch does not look"
    with pytest.raises(UserError, match="checksum"):
        safe_load.read_weights_file(path)


def test_a_zip_bomb_a_link_loop_and_a_pipe_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(UserError, match="more than its size"):
        safe_load.read_weights_file(tmp_path / "bomb.pth")
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    with pytest.raises(UserError, match="not there"):
        safe_load.read_weights_file(tmp_path / "loop.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UserError, match="no file"):
        safe_load.read_weights_file(tmp_path / "pipe.pth")


def test_a_worker_that_dies_while_a_file_is_written_is_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(content: object, file: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        files.save_atomically({}, tmp_path / "run.pth")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_one_runs_alone_until_its_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PATIENCE_S", 0.3)
    hold = (
        "import sys, pathlib\nfrom base import files\n"
        "file = files.lock_folder(pathlib.Path(sys.argv[1]))\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        cwd=Path(files.__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"SLURM_JOB_ID": "7"},
    )
    try:
        assert other.stdout.readline() == "held\n"
        words = (
            f"process {other.pid} of job 7 on .* writes its run there; end it, or choose another"
        )
        with pytest.raises(UserError, match=f"{words}$"):
            files.lock_folder(tmp_path)
        monkeypatch.setattr(files, "PATIENCE_AFAR_S", 0.3)
        monkeypatch.setattr(files.socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(UserError, match=f"{words}; if its machine is dead, remove .lock"):
            files.lock_folder(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "7")  # started again, and the other node is dead
        files.lock_folder(tmp_path).close()
    finally:
        other.kill()
        other.wait()
    with files.lock_folder(tmp_path):
        assert f"process {os.getpid()} of job 7 on" in (tmp_path / ".lock").read_text()


def test_a_flipped_bit_in_a_safetensors_file_of_ours_is_found(tmp_path: Path) -> None:
    path, weights = tmp_path / "teacher.safetensors", {"a": torch.arange(7.0), "b": torch.ones(3)}
    safe_load.save_safetensors(weights, path)
    torch.testing.assert_close(safe_load.read_weights_file(path), weights)
    whole = path.read_bytes()
    for place in (-1, -17, -40):  # in the data
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(CorruptFile, match="differs from its hash"):
            safe_load.read_weights_file(path)
    safetensors.torch.save_file(weights, path)  # another program's: no hash
    torch.testing.assert_close(safe_load.read_weights_file(path), weights)
