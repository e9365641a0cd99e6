"""
Print one of the README's two commands, so that the gate runs the very text a reader copies.

Usage: python3 .ci/readme_command.py main|tests
"""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def main() -> None:
    commands = re.findall(r"^```sh\n(.+)\n```$", README.read_text("utf-8"), re.MULTILINE)
    if len(commands) != 2:
        sys.exit(f"README.md must have two `sh` blocks of one line each, not {len(commands)}")
    print(dict(zip(("main", "tests"), commands, strict=True))[sys.argv[1]])


if __name__ == "__main__":
    main()
