"""Are pinned dependencies known to be vulnerable: `make audit` asks the service that pip-audit asks.

0: none is, or nobody could be asked, which is said in capitals; 1: some are.
"""

from __future__ import annotations

import json
import subprocess
import sys


def audited(file: str) -> list[str] | None:
    """Vulnerable packages of a file of pins, a line each; None where the service did not answer."""
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--requirement",
        file,
        "--no-deps",
        "--disable-pip",
        "--format",
        "json",
    ]
    try:
        done = subprocess.run(
            [*command, "--progress-spinner", "off", "--timeout", "20"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError, subprocess.TimeoutExpired):
        return None
    if any("skip_reason" in one for one in found):  # what was not looked up is not known to be sound
        return None
    return [
        f"{one['name']} {one['version']}: {', '.join(v['id'] for v in one['vulns'])}"
        for one in found
        if one.get("vulns")
    ]


def main(files: list[str]) -> int:
    bad = 0
    for file in files:
        found = audited(file)
        if found is None:
            print(
                f"NOT AUDITED: {file}, as no service of vulnerabilities answered for every package",
                file=sys.stderr,
            )
        for line in found or ():
            print(f"VULNERABLE: {file}: {line}", file=sys.stderr)
        bad += len(found or ())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
