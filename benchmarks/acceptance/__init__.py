"""The first thing to run on a GPU: builds, tests, tunes, measures, and writes JSON, a Markdown table and plots.

    python -m benchmarks.acceptance first --out DIR
    python -m benchmarks.acceptance second --out DIR --chosen DIR
    python -m benchmarks.acceptance peers --out DIR

Each run needs no network, nothing that another has built, and less than ten minutes. The first builds, tests and tunes;
the launch configurations that it chose are among its results. The second measures engine and kernels with them, and
runs the sanitizer; --chosen is the folder of the first, by default --out, and without it nothing is run. The third
measures the same work by others. What would keep everything from running (no GPU, no Triton, no extension) is said
before anything is measured. Each stage is a process of its own with a time limit, and the limits of a run's stages add
up to its time, so one that fails or hangs is recorded and the others still run; rows are written as they are measured,
so a stage that is stopped keeps what it has. A stage is run again by itself with --only, into the same DIR; all but
"build" need what it built, and most the limits found by "machine". DIR holds README.md, results.json, log.txt, the
launch configurations and two plots: copy all but the log to benchmarks/results/<gpu>/ and commit it. Targets are shares
of the memory bandwidth measured in the run, so that they mean the same on any GPU.

With --dry-run a run needs no GPU: every stage runs on a stand-in, with sizes that Triton's interpreter can bear. That
shows that each line runs, that graphs replay what was captured, and that everything is written where the next stage
looks for it; of compiled kernels, memory and times it shows nothing. With TRITON_INTERPRET=1 alone the stages run that
mean something there: "build", the limits of the processor, and for each kernel some of its comparisons with its twin.

    stages.py     the stages and runs, and how a stage is run
    results.py    results.json
    tables.py     launch configurations that one run chose and another uses
    building.py   the extension; compiling kernels on all cores
    parity.py     every kernel equals its twin; compute-sanitizer
    kernels.py    the machine's limits, tuning, every kernel beside its peers
    engines.py    whole images, accuracy, windows
    peers.py      the same work by others
    report.py     README.md and plots
    stand_in.py   a GPU where there is none
    dry.py        sizes of a dry run
"""
