"""Publish an artifact folder to a dataset repository of the Hugging Face Hub, in one commit.

  python tools/push.py distilled/cifar100-ipc50 org/cifar100-ncfm --dry-run
  python tools/push.py distilled/cifar100-ipc50 org/cifar100-ncfm --revision v1
  python tools/push.py distilled/cifar100-ipc10 org/cifar100-ncfm      # a second size, beside the first

What people wrote in the card on the Hub stays. What is there already is not committed again.
"""

import argparse
from pathlib import Path

from command_line import add_push_flags, command_parser, push_options, run_command

from distilled_data.terminal import printable
from hub import plan_push, push_folder


def parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="artifact folder, as distill_and_push.py writes it")
    add("repo", help="dataset repository, org/name; without org/, one of your own")
    add("--dry-run", action="store_true", help="print what would be done and change nothing")
    add_push_flags(parser)
    return parser


def main(arguments: argparse.Namespace) -> None:
    options = push_options(arguments)
    if arguments.dry_run:
        print(printable(str(plan_push(arguments.folder, arguments.repo, options))))
    else:
        print(push_folder(arguments.folder, arguments.repo, options))


if __name__ == "__main__":
    run_command(main, parser())
