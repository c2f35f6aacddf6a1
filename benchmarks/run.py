"""Run the benchmarks of the papers, or others: one after another, each in its process.

Options are those of the benchmarks; options of some of them go to these alone.

    python benchmarks/run.py --quick --check
    python benchmarks/run.py --jobs 2 --data FOLDER
    python benchmarks/run.py --quick --only speed/overhead speed/dcan
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAPERS = (
    *("clustering_module", "aecm", "neural_mixture_em"),
    *("deep_dpm", "autoencoder_deep_dpm", "dcan"),
)
SPEED = ("overhead", "neural_mixture_em", "deep_dpm", "dcan", "threads")
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
    names = (*PAPERS, *(f"speed/{name}" for name in SPEED))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=names, default=PAPERS, help="benchmarks")
    for option in OWN:
        parser.add_argument(option)
    options, shared = parser.parse_known_args()
    failed = []
    for name in options.only:
        print(f"\n=== {name}", flush=True)
        asked = {option: getattr(options, option[2:].replace("-", "_")) for option in OWN}
        own = [
            text for o, value in asked.items() if value and name in OWN[o] for text in (o, value)
        ]
        path = HERE / (name if name.startswith("speed/") else f"papers/{name}")
        if subprocess.run([sys.executable, f"{path}.py", *shared, *own], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
