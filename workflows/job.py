"""Runs one frozen job: ``python -m workflows.job ID [RECEIPT] [--results DIR]``.

The command is what Snakemake's rules call, and what one calls by hand to run or debug a single job. It returns at
once where the record is there already. With ``ASSAY_RESIDENT`` set it hands itself to the resident process of the
invocation, which has everything imported; the modules loaded here are the standard library's only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run the job in this process. Returns the exit code; prints one sentence where a user can help."""
    from methods.stage import AssayError, Interrupted
    from workflows import runner

    job_id, receipt, results = _arguments(argv)
    try:
        runner.run(job_id, results, receipt)
    except Interrupted as error:
        print(f"assay: {job_id}: {error}", file=sys.stderr)
        return 143
    except AssayError as error:
        print(f"assay: {job_id}: {error}", file=sys.stderr)
        return 2
    return 0


def _arguments(argv: list[str]) -> tuple[str, Path | None, Path]:
    """The job's id, the receipt to leave (or None by hand), and the results folder."""
    plain = [argument for argument in argv if not argument.startswith("--results=")]
    named = [argument.removeprefix("--results=") for argument in argv if argument.startswith("--results=")]
    if not 1 <= len(plain) <= 2:
        raise SystemExit("usage: python -m workflows.job ID [RECEIPT] [--results=DIR]")
    receipt = Path(plain[1]) if len(plain) == 2 else None
    # a receipt lies at results/receipts/<invocation>/<id>
    results = Path(named[0]) if named else receipt.parents[2] if receipt else Path("results")
    return plain[0], receipt, results


if __name__ == "__main__":
    if os.environ.get("ASSAY_RESIDENT"):
        from workflows.resident import run_in_resident

        sys.exit(run_in_resident(sys.argv[1:], os.getcwd(), dict(os.environ)))
    sys.exit(main(sys.argv[1:]))
