"""`python -m benchmarks`, from a checkout: time and memory beside a copy of the same bytes on the same machine.

| file          | what it holds                                                             |
|---------------|---------------------------------------------------------------------------|
| `cases.py`    | the tables: what is timed, beside whom, on which checkpoints              |
| `figures.py`  | the figures to reach, and what was measured of them                       |
| `shapes.py`   | checkpoints to time it on: seeded, written tensor by tensor               |
| `kimi.py`     | the one that is too large to exist: real headers, payloads of holes       |
| `tasks.py`    | what one timed process does                                               |
| `kernels.py`  | loops over memory against memcpy, inside one process                      |
| `measure.py`  | runs processes in turn: seconds, and peak of anonymous memory             |
| `results.py`  | what comes out, as values                                                 |
| `run.py`      | `run_bench`: all of it in order                                           |
| `tables.py`   | Markdown tables, for the terminal and for docs/performance.md             |
| `plots.py`    | time against size, as SVG                                                 |
| `page.py`     | puts tables and plots into docs/performance.md                            |
| `machine.py`  | what the numbers were measured on                                         |
| `__main__.py` | the command: options as text, the report as tables or JSON                |
"""
