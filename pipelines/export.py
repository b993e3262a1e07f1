"""`vqscale export`: the models of a run as a folder that others can use."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vqscale import storage
from vqscale.arguments import RUN_HELP, OneLineParser, examples
from vqscale.config.layout import RunLayout
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.exporting import export_run
from vqscale.model_files import is_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `vqscale export`; returns its exit code."""
    try:
        return _export(_parser().parse(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _parser() -> OneLineParser:
    text = "Write a run's models, their config and a card into a folder."
    some = examples("vqscale export latest exported", "vqscale export latest s3://bucket/model --force")
    parser = OneLineParser(prog="vqscale export", description=text, epilog=some)
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("place", metavar="DIR", help="folder or URL to write into")
    parser.add_argument("--force", action="store_true", help="replace an exported model that is there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _export(options: argparse.Namespace) -> int:
    if not is_run(options.run):
        raise UserError("is no run directory", where=options.run, mend="vqscale ls lists the runs")
    exported = export_run(RunLayout(Path(options.run).resolve()), options.place, replace=options.force)
    if options.json:
        print(json.dumps({"place": options.place, **exported.model_dump(mode="json")}, indent=2))
        return 0
    for name, file in exported.files.items():
        print(f"{storage.join(options.place, name)}  {file.bytes:,} bytes")
    print(f"read it:   from vqscale import load_tokenizer; load_tokenizer({options.place!r})")
    print(f"its card:  {storage.join(options.place, 'README.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
