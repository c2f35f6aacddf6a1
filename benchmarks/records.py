"""What all benchmarks share: files of results, and what is written beside each figure."""

import csv
import os
import platform
from functools import lru_cache
from pathlib import Path

import sklearn
import torch

import deepmix

VERSIONS = {
    "deepmix": deepmix.__version__,
    "torch": torch.__version__,
    "sklearn": sklearn.__version__,
}


@lru_cache
def device_name(device):
    """Name of the processor that ``device`` stands for."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "cpu"
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def read_rows(path):
    """Rows of a CSV file: list of dict of str to str; empty where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows, fields=None):
    """Write a CSV file anew, with the columns ``fields``, by default those of the first row.

    The file is exchanged in one step: whoever stops the benchmark has the old one or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".part")
    with whole.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(whole, path)


def append_row(path, row, fields):
    """Add a row; the file is whole after every one."""
    if not path.is_file():
        write_rows(path, [], fields)
    with path.open("a", newline="") as file:
        csv.DictWriter(file, fields, lineterminator="\n").writerow(row)


def rounded(row):
    """Numbers of a row with six digits."""
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
