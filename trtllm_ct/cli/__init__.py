"""The command line.

commands.py  `trtllm-ct`: arguments, exit codes, JSON
report.py    what the commands print
folding.py   `layers.{0..31}` instead of 32 lines
doctor.py    diagnose: which engine this machine has, and what it serves
demo.py      `trtllm-ct demo`
demo_data/   the checkpoint that it runs on
"""
