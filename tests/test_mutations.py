"""10,000 artifacts altered at random: each is refused with an error of ours, or has the right content."""

import json
import os
import random
from collections import Counter

import pytest
from safetensors.torch import load

from distilled_data import DistilledDataset, FormatError, IntegrityError
from distilled_data.format import ARTIFACT_FILE, MANIFEST_FILE, write_artifact
from distilled_data.manifest import Fingerprint, write_manifest

COUNT = int(os.environ.get("MUTATIONS", "10000"))
PARTS = 10  # of a file with few tests pytest-xdist begins last, when one worker may have nothing left to do


def mutated(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """What was done, and the bytes after it: flipped bits, a cut or an edit of the header."""
    size = 8 + int.from_bytes(content[:8], "little")
    match kind := chance.choice(["data", "header", "length", "cut", "longer", "edit"]):
        case "data" | "header" | "length":
            start, end = {"data": (size, len(content)), "header": (8, size), "length": (0, 8)}[kind]
            damaged = bytearray(content)
            for _ in range(chance.choice([1, 1, 2, 8])):
                damaged[chance.randrange(start, end)] ^= 1 << chance.randrange(8)
            return kind, bytes(damaged)
        case "cut":
            return kind, content[: chance.randrange(len(content))]
        case "longer":
            return kind, content + chance.randbytes(chance.randrange(1, 64))
    header = bytearray(content[8:size])
    for _ in range(chance.randrange(1, 4)):
        start = chance.randrange(len(header))
        end = start + chance.randrange(12)
        other = chance.randrange(len(header))
        header[start:end] = chance.choice(
            [b"", b"9", b'"', b"{}", b"-1", b"null", header[other : other + 20]]
        )
    return kind, len(header).to_bytes(8, "little") + bytes(header) + content[size:]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("manifest", ["as published", "made to agree"])
def test_an_altered_artifact_is_refused_or_loads_to_the_right_content(
    tmp_path, artifact, manifest, part, capsys, monkeypatch
):
    monkeypatch.setattr("distilled_data.manifest.BETWEEN", 0)  # nobody writes another manifest here
    path = tmp_path / ARTIFACT_FILE
    write_artifact(path, artifact)
    write_manifest(tmp_path)
    content, chance, outcomes = path.read_bytes(), random.Random(part), Counter()
    published = json.loads((tmp_path / MANIFEST_FILE).read_bytes())
    for _ in range(COUNT // (2 * PARTS)):
        kind, damaged = mutated(content, chance)
        path.write_bytes(damaged)
        if manifest == "made to agree":  # a publisher, and not an accident, did it
            entry = Fingerprint.of_bytes(damaged)
            published["files"][ARTIFACT_FILE] = {"sha256": entry.sha256, "size": entry.size}
            (tmp_path / MANIFEST_FILE).write_text(json.dumps(published))
        try:
            data = DistilledDataset.from_folder(tmp_path)
        except (FormatError, IntegrityError) as error:
            outcomes[kind, type(error).__name__] += 1
            continue
        if manifest == "as published":
            assert damaged == content
        else:  # what was published is what is loaded: all of it, as safetensors alone reads it
            for name, tensor in load(damaged).items():
                assert data.artifact.tensors[name].numpy().tobytes() == tensor.numpy().tobytes()
            assert data[len(data) - 1][0].shape == (data.info.channels, data.info.height, data.info.width)
        outcomes[kind, "same content" if data.content_hash == artifact.content_hash else "other content"] += 1
    with capsys.disabled():
        if "MUTATIONS" in os.environ:
            print(f"\n{manifest}: " + ", ".join(f"{k} {o} {n}" for (k, o), n in sorted(outcomes.items())))
    assert outcomes.total() == COUNT // (2 * PARTS)
