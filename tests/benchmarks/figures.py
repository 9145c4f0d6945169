"""The command line that all benchmarks share: `--json`, and whole-number options of their own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping


def run(
    description: str | None,
    measure: Callable[[argparse.Namespace], Mapping[str, object]],
    configure: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    **numbers: int | None,
) -> None:
    """Parse the arguments, measure, print the figures.

    Args:
        description: the benchmark's docstring, which `--help` prints.
        measure: from the parsed options to named figures.
        configure: adds further options.
        numbers: whole-number options with their defaults: `repeats=15` is `--repeats 15`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    for name, default in numbers.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, help=f"default: {default}"
        )
    configure(parser)
    options = parser.parse_args()
    figures = measure(options)
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        print("\n".join(f"{name}: {value}" for name, value in figures.items()))
