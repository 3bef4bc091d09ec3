"""What a result says of where it was measured."""

import platform
import subprocess

import pytest

from ncfm_engine import provenance as module
from ncfm_engine.provenance import command, provenance


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("/home/me/sets/digits", "digits"),
        ("/home/me/sets/digits/", "digits/"),
        ("--data=/home/me/data", "--data=data"),
        ("wds:file:///home/me/0.tar", "wds:file://0.tar"),
        ("wds:pipe:curl -H 'token: secret' https://host/0.tar", "wds:pipe:"),
        ("folder:/home/me/photos", "folder:photos"),
        ("sqlite:////home/me/search.db", "sqlite:///search.db"),
        ("postgresql://me:secret@host:5432/studies", "postgresql://host:5432/studies"),
        ("postgresql://me:se/cr@t@host/studies?password=x", "postgresql://host/studies"),
        ("mysql://me:se cr@t@host/studies", "mysql://host/studies"),
        ("wds:pipe:curl -H 'token: secret' \\\n https://host/0.tar", "wds:pipe:"),
        ("https://host/0.tar#token=secret", "https://host/0.tar"),
        ("https://host/shards/0.tar", "https://host/shards/0.tar"),
        ("distilled/digits-ipc10", "distilled/digits-ipc10"),
    ],
)
def test_the_command_is_told_without_places_and_passwords(monkeypatch, word, told):
    monkeypatch.setattr("sys.argv", ["/home/me/tools/tool.py", word])
    assert command() == f"tool.py {told}"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (r"C:\Users\me\sets\digits", "digits"),
        (r"--data=C:\Users\me\data", "--data=data"),
        (r"folder:C:\Users\me\photos", "folder:photos"),
        ("folder:C:/Users/me/photos", "folder:photos"),
        (r"\\server\me\photos", "photos"),
        (r"sqlite:///C:\Users\me\search.db", "sqlite:///search.db"),
        ("distilled\\digits-ipc10", r"'distilled\digits-ipc10'"),
    ],
)
def test_places_of_windows_are_not_told_either(monkeypatch, word, told):
    monkeypatch.setattr("sys.argv", ["tool.py", word])
    assert command() == f"tool.py {told}"


def test_the_revision_of_the_code_is_told_where_it_can_be_known(monkeypatch, tmp_path):
    def git(*words: str) -> str:
        here = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@host"]
        return subprocess.run([*here, *words], check=True, capture_output=True, text=True).stdout.strip()

    def told() -> str:
        return provenance("cpu")["code_revision"]

    monkeypatch.setattr(module, "__file__", str(tmp_path / "ncfm_engine" / "provenance.py"))
    assert told() == "unknown"  # of what is installed
    git("init", "-q")
    assert told() == "unknown"  # nothing is committed
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert told() == git("rev-parse", "HEAD")
    (tmp_path / "file").touch()
    git("add", "file")
    assert told() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert told() == "unknown"  # without git
    assert provenance("cpu")["device"] == f"cpu ({platform.machine()})"
