"""The vocabulary that every folder uses: errors, dtypes, schemes, and what this process may use of its machine.

errors.py         the exception tree, and how the faults of one stage are gathered
dtypes.py         the one table of dtypes, by their names in files and in torch
schemes.py        how weights and activations are quantized: strategies, arguments, algorithms, tensor specs
cores.py          how many processor cores this process may use
memory_budget.py  how much memory this process may still take
collector.py      Python's garbage collector, paused while very many objects are made
version.py        the version of this package
"""
