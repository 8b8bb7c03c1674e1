"""`python -m benchmarks`, from a checkout: measure time and memory, compared with a copy of the same bytes.

| file          | what it holds                                                             |
|---------------|---------------------------------------------------------------------------|
| `cases.py`    | the cases: what is timed, against which peers, on which checkpoints       |
| `figures.py`  | the target figures, and their measured values                             |
| `shapes.py`   | synthetic checkpoints: seeded, written tensor by tensor                   |
| `kimi.py`     | a checkpoint too large to write: real headers, sparse files as payload    |
| `tasks.py`    | the tasks that run in a timed process                                     |
| `kernels.py`  | compiled loops against memcpy, in one process                             |
| `measure.py`  | runs processes in turn; measures seconds and peak anonymous memory        |
| `results.py`  | the results as dataclasses                                                |
| `run.py`      | `run_bench`: runs the whole benchmark                                     |
| `tables.py`   | formats the tables, for the terminal and for docs/performance.md          |
| `plots.py`    | plots time against size, as SVG                                           |
| `page.py`     | writes tables and plots into docs/performance.md                          |
| `machine.py`  | describes the machine of the measurements                                 |
| `experts.py`  | `python -m benchmarks.experts`: int4 experts, dequantized and requantized |
| `__main__.py` | the command line; prints the report as tables or JSON                     |
"""
