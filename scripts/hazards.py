"""Runs comfy-test's hazard scan over the pack and fails on any finding in its bands A to C.

comfy-test only reports; here an empty report is a condition. Runs in the host's Python: ``python scripts/run.py
scripts/hazards.py [FOLDER]``.
"""

import sys
from pathlib import Path

from comfy_test.orchestration.levels import hazards

GATED = (hazards.BAND_A, hazards.BAND_B, hazards.BAND_C)


def main(folder: Path) -> int:
    """Print every finding by band; 1 if a gated band has one or a check itself broke, else 0."""
    failed = shown = 0
    for band, name, description, check in hazards.CHECKS:
        findings = check(folder)
        if findings:
            gated = band in GATED
            failed += gated
            shown += 1
            print(f"[{band}] {name}: {description}{'' if gated else ' (for judgement, not a failure)'}")
            print("".join(f"    {finding}\n" for finding in findings), end="")
    files = sum(1 for _ in hazards._py_files(folder))
    print(f"{len(hazards.CHECKS)} hazard checks over {files} files: {shown} with findings, {failed} in bands A to C.")
    return 1 if failed or not files else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent))
