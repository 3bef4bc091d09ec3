"""What a result says of where it was measured."""

import pytest

from ncfm_engine.provenance import command


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
        ("https://host/shards/0.tar", "https://host/shards/0.tar"),
        ("distilled/digits-ipc10", "distilled/digits-ipc10"),
    ],
)
def test_the_command_is_told_without_places_and_passwords(monkeypatch, word, told):
    monkeypatch.setattr("sys.argv", ["/home/me/tools/tool.py", word])
    assert command() == f"tool.py {told}"
