"""The command line.

main.py      the entry point
commands.py  the commands of `trtllm-ct`; their arguments are in the next files
inspect_commands.py  inspect, plan and compare
convert_commands.py  convert and verify
run_commands.py      generate, doctor and demo
cache_commands.py    the commands of `trtllm-ct cache`
run.py       runs them: logging, errors, exit codes, JSON output
progress.py  how far a conversion or a verification is
options.py   the options that commands share
plain_values.py  values of arguments that Typer need not convert
report.py    formats what inspect, plan, convert and verify print
machine_report.py    formats what doctor and the commands of cache print
reference_report.py  formats what generate, calibrate and perplexity print
lines.py     lines of reports: faults, deviations, warnings, and texts of strangers shown harmlessly
page/        reports as one HTML page
comparison_report.py  formats what compare prints
tables.py    tables and names that are never cut off
streams.py   the standard streams, which may be closed or full
console.py   their consoles, for which rich is imported when something is printed
safe_console.py      the console of rich: no control characters of strangers
interrupts.py  ends a command on Ctrl-C and SIGTERM
log_format.py  warnings without control characters
plan_rows.py  the rows of a plan, in which tensors of all layers and experts share a row
folding.py   folds names of repeated modules: `layers.{0..31}` instead of 32 lines
doctor.py    diagnose: find out which engine this machine has and how it would serve a checkpoint
demo.py      `trtllm-ct demo`
demo_data/   the checkpoint that the demo runs on
"""
