"""Run the benchmarks of the papers: every file of benchmarks/papers with a table to reproduce.

Options are those of the benchmarks; options of some of them go to these alone.

    python benchmarks/run.py --quick --check
    python benchmarks/run.py --jobs 2 --data FOLDER
"""

import argparse
import subprocess
import sys
from pathlib import Path

PAPERS = Path(__file__).parent / "papers"
NAMES = (
    "clustering_module",
    "aecm",
    "neural_mixture_em",
    "deep_dpm",
    "autoencoder_deep_dpm",
    "dcan",
)
# Options that not every benchmark has.
OWN = {
    "--epochs": ("clustering_module", "neural_mixture_em"),
    "--timed-epochs": ("clustering_module",),
    "--budget": ("aecm", "neural_mixture_em"),
    "--precision": ("aecm", "neural_mixture_em"),
    "--side": ("neural_mixture_em",),
    "--network": ("neural_mixture_em",),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="benchmarks")
    for option in OWN:
        parser.add_argument(option)
    options, shared = parser.parse_known_args()
    codes = {}
    for name in options.only:
        print(f"\n=== {name}", flush=True)
        own = [
            text
            for option, owners in OWN.items()
            if name in owners and (value := getattr(options, option[2:].replace("-", "_")))
            for text in (option, value)
        ]
        command = [sys.executable, PAPERS / f"{name}.py", *shared, *own]
        codes[name] = subprocess.run(command, check=False).returncode
    failed = [name for name, code in codes.items() if code]
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
