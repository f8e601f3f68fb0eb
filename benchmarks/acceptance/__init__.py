"""The first thing to run on a GPU: builds, tests, tunes, measures, and writes JSON, a Markdown table and plots.

    python -m benchmarks.acceptance --out DIR [--only STAGE ...]

Needs no network and less than nine minutes. What would keep everything from running (no GPU, no Triton, no extension)
is said before anything is measured. Each stage is a process of its own with a time limit, so one that fails or hangs is
recorded and the others still run; rows are written as they are measured, so a stage that is stopped keeps what it has.
A stage that had no time is run by itself with --only, into the same DIR; all but "build" need what it built, and most
the limits found by "machine". DIR holds README.md, results.json, log.txt, the launch configurations that were chosen
and two plots: copy all but the log to benchmarks/results/<gpu>/ and commit it.

With TRITON_INTERPRET=1 it needs no GPU, and runs the stages that mean something there: "build", the limits of the
processor, and for each kernel some of its comparisons with its plain twin.

    stages.py     the stages in order, and how one is run
    results.py    results.json
    building.py   the extension; compiling kernels on all cores
    parity.py     every kernel equals its twin; compute-sanitizer
    kernels.py    the machine's limits, tuning, every kernel beside its peers
    engines.py    whole images, accuracy, windows
    peers.py      the same work by others
    report.py     README.md and plots
"""
