"""Check that a wheel holds the package `rilq`, all of it, and nothing else.

    python .ci/check_wheel.py dist/rilq-*.whl

The folders of the package stand at the root of the repository, so a line forgotten under
`[tool.setuptools] packages` would show only in a wheel.
"""

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_PACKAGED = {"tests", "benchmarks", "docs", "examples", "build", "dist"}


def expected_modules() -> set[str]:
    """Names in the wheel of every module in the working tree."""
    relative = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    return {
        f"rilq/{path.as_posix()}"
        for path in relative
        if path.parts[0] not in NOT_PACKAGED and not path.parts[0].startswith(".")
    }


def main() -> None:
    """Compare; exit 1 with the differences."""
    wheel = Path(sys.argv[1])
    names = set(zipfile.ZipFile(wheel).namelist())
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info/"
    missing = (expected_modules() | {"rilq/py.typed"}) - names
    foreign = {n for n in names if not n.startswith(("rilq/", info))}
    foreign |= {n for n in names if n.endswith(".py")} - expected_modules()
    for name in sorted(missing):
        print(f"{wheel}: {name} is missing; is its folder listed in pyproject.toml?")
    for name in sorted(foreign):
        print(f"{wheel}: {name} does not belong in the package")
    if missing or foreign:
        raise SystemExit(1)
    print(f"{wheel}: {len(names)} files, all of rilq and nothing else")


if __name__ == "__main__":
    main()
