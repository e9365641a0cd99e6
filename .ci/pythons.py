"""
Print a line `py313<TAB>/path/to/python3.13` for every released Python from 3.11 up on this machine.

Those that a version manager holds count too, whether or not it has them activated.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HOME = Path.home()

# Where version managers keep their Pythons; each holds one folder with a `bin` per version.
KEPT = (
    Path(os.environ.get("PYENV_ROOT", HOME / ".pyenv"), "versions"),
    HOME / ".pyenv/versions",
    Path(os.environ.get("UV_PYTHON_INSTALL_DIR", HOME / ".local/share/uv/python")),
    Path(os.environ.get("ASDF_DATA_DIR", HOME / ".asdf"), "installs/python"),
    Path(os.environ.get("MISE_DATA_DIR", HOME / ".local/share/mise"), "installs/python"),
)

# Nothing less tells whether a candidate works: a pyenv shim stands on PATH for versions that
# it refuses to run, and Debian ships Pythons that cannot make an environment.
PROBE = """
import ensurepip, sys, sysconfig, venv
assert sys.version_info >= (3, 11), "older than 3.11"
assert sys.version_info.releaselevel == "final", "not a release"
free_threaded = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
print("py%d%d%s" % (*sys.version_info[:2], free_threaded), sys.executable, sep="\\t")
"""


def candidates() -> Iterator[Path]:
    folders = [Path(folder) for folder in os.get_exec_path()]
    for versions in KEPT:
        folders += sorted(versions.glob("*/bin"), reverse=True)
    yield Path(sys.executable)
    for folder in folders:
        if folder.is_dir():
            yield from sorted(
                path
                for path in folder.iterdir()
                if re.fullmatch(r"python3\.(1[1-9]|[2-9]\d)t?", path.name)
            )


def main() -> None:
    found: dict[str, str] = {}
    for candidate in dict.fromkeys(path.absolute() for path in candidates()):
        try:
            probe = subprocess.run(
                [candidate, "-I", "-c", PROBE], capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"leaving out {candidate}: {error}", file=sys.stderr)
            continue
        if probe.returncode:
            said = probe.stderr.strip().splitlines() or ["it does not run"]
            reason = said[-1 if said[0].startswith("Traceback") else 0]
            print(f"leaving out {candidate}: {reason}", file=sys.stderr)
            continue
        name, executable = probe.stdout.strip().split("\t")
        found.setdefault(name, executable)
    # By version, and the free-threaded build of one after the ordinary.
    for name in sorted(found):
        print(name, found[name], sep="\t")


if __name__ == "__main__":
    main()
