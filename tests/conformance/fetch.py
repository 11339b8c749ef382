"""The tests of the installed transformers, taken from its source distribution."""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import transformers


# Upstream's test package is called `tests`, as ours is, so it is unpacked under a name of its own.
PACKAGE = "transformers_tests"

CACHE_VARIABLE = "CONFORMANCE_CACHE"


def cache_folder() -> Path:
    """Folder that keeps what was fetched: `$CONFORMANCE_CACHE`, or `.cache/conformance` in the repository."""
    default = Path(__file__).resolve().parents[2] / ".cache" / "conformance"
    return Path(os.environ.get(CACHE_VARIABLE, default))


def fetch_tests() -> Path:
    """Return the folder to put on `sys.path` so that `transformers_tests.test_modeling_common` can be imported.

    Downloads through pip as it is configured, once per version. Raises `RuntimeError` where there is no such source
    distribution.
    """
    version = transformers.__version__
    folder = cache_folder() / f"transformers-{version}"
    if folder.exists():
        return folder

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        sdist = _download_sdist(version, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        _unpack_tests(sdist, unpacked / PACKAGE)
        # The rename is the last step, so a folder of that name is always whole.
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, with the same files
                raise
    return folder


def _download_sdist(version: str, destination: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(destination), f"transformers=={version}"]
    result = subprocess.run(command, capture_output=True, text=True)
    sdists = list(destination.glob("transformers-*.tar.gz"))
    if not sdists:
        raise RuntimeError(
            f"pip found no source distribution of transformers {version} (a build from a git checkout has none):\n"
            f"{result.stdout}{result.stderr}"
        )
    return sdists[0]


def _unpack_tests(sdist: Path, destination: Path) -> None:
    """Copy `transformers-*/tests/**` of the archive to `destination`, byte for byte."""
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            parts = PurePosixPath(member.name).parts
            if member.isfile() and len(parts) > 2 and parts[1] == "tests" and ".." not in parts:
                target = destination.joinpath(*parts[2:])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
    if not (destination / "test_modeling_common.py").exists():
        raise RuntimeError(f"{sdist.name} holds no tests/test_modeling_common.py")
