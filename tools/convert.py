"""Other projects' distilled sets into artifact folders, and artifact folders into their forms.

  python tools/convert.py data_20000.pt distilled/cifar10-ncfm --name cifar10 --factor 2 --values unit
  python tools/convert.py images_best.pt distilled/cifar10-mtt --name cifar10 --values normalised \\
      --mean 0.4914 0.4822 0.4465 --std 0.2023 0.1994 0.2010
  python tools/convert.py syn_data distilled/sre2l
  python tools/convert.py distilled/digits-ipc10 digits.npz

Read are NCFM and IDC (.pt), DC, DSA and DM (.pt), MTT and DATM (images_X.pt beside labels_X.pt), a dict of
images and labels (.pt), folders of images per class (SRe2L, RDED) and .npz. The output's name says what is
written: .npz, .pt (NCFM), images_X.pt (MTT), or a folder: an artifact, or for what is one already, images per
class. What a file does not say, such as how it was normalised, has to be said here, or is guessed with a
note.
"""

import argparse
import os
import warnings
from pathlib import Path

from command_line import command_parser, run_command

from distilled_data import DistilledDataset, UsageError
from distilled_data.files import new_folder
from distilled_data.format import ARTIFACT_FILE, MANIFEST_FILE, write_artifact
from distilled_data.interchange import labels_beside, read_set, write_set
from distilled_data.tensors import VALUES
from hub import complete_folder
from ncfm_engine.sources.reader import class_names

WORDS = ("name", "classes", "factor", "values", "mean", "std", "license", "experiment")  # of `read_set`


def parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("source", type=Path, help="a set of another project, or an artifact folder")
    add("output", type=Path, help="artifact folder to write, or the file or folder to export to")
    add("--name", help="name of the dataset (default: that of the file)")
    add(
        "--classes",
        help="class names in label order: with commas, or a file with one on each line (default: numbers; "
        "those of cifar10 and cifar100)",
    )
    add("--factor", type=int, help="each image is factor x factor tiles (NCFM, IDC: 2; default: guessed)")
    add("--values", choices=VALUES, help="pixels are 0 to 255, 0 to 1, or normalised (default: guessed)")
    add("--mean", type=float, nargs="+", help="per channel, that the images were normalised with")
    add("--std", type=float, nargs="+", help="likewise")
    add("--license", help="of the real images, for the card")
    add("--experiment", type=int, default=-1, help="which one of a DC, DSA or DM file (default: the last)")
    return parser


def main(arguments: argparse.Namespace) -> None:
    pair = [labels_beside(arguments.output)] if arguments.output.suffix == ".pt" else []
    for path in (arguments.output, *pair):
        if os.path.exists(path):  # what cannot be looked up is told by what writes it
            raise UsageError(f"{path} is there already; choose another name, or remove it")
    if any(os.path.exists(arguments.source / name) for name in (ARTIFACT_FILE, MANIFEST_FILE)):
        said = [f"--{name}" for name in WORDS if getattr(arguments, name) != parser().get_default(name)]
        if said:
            raise UsageError(f"{arguments.source} is an artifact, which says itself what {said[0]} would")
        data = DistilledDataset.from_folder(arguments.source)
        export(data, arguments.output)
        print(f"{data}\nwritten to {arguments.output}")
        return
    words = {name: getattr(arguments, name) for name in WORDS}
    if (text := arguments.classes) is not None:  # those of ImageNet have commas in them
        listed = [name.strip() for name in text.split(",")]
        words["classes"] = class_names(Path(text)) if os.path.isfile(text) else listed
    artifact = read_set(arguments.source, **words)
    data = DistilledDataset(artifact)
    if arguments.output.suffix in (".npz", ".pt"):
        export(data, arguments.output)
    else:
        with new_folder(arguments.output) as folder:
            write_artifact(folder / ARTIFACT_FILE, artifact)
            complete_folder(folder)
    print(f"{data}\nwritten to {arguments.output}")


def export(data: DistilledDataset, output: Path) -> None:
    """Write the set, and say what its new form lacks or does not say."""
    write_set(data, output)
    if output.suffix == ".pt" and output.name.startswith("images"):
        mean, std = (" ".join(map(str, numbers)) for numbers in (data.mean, data.std))
        warnings.warn(
            f"the images are normalised: --values normalised --mean {mean} --std {std}", stacklevel=1
        )
    elif output.suffix != ".npz" and data.artifact.logits is not None:
        warnings.warn("the soft labels are left out; .npz and images_X.pt hold them", stacklevel=1)


if __name__ == "__main__":
    run_command(main, parser())
