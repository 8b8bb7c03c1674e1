"""The shared vocabulary of all other folders: errors, dtypes, quantization schemes, and limits of this process.

errors.py         the exception classes, and a collector for all faults of one stage
lost_remedies.py  what to do about tensors that no file has
arguments.py      checks of the arguments of public functions
dtypes.py         the dtype table: names in safetensors headers and in torch
schemes.py        how weights and activations are quantized: strategies, arguments, algorithms, tensor specs
cores.py          how many processor cores this process may use
memory_budget.py  how much memory this process may still allocate
collector.py      a context manager that pauses Python's garbage collector
texts.py          makes text of strangers fit for a message
json_values.py    how many values a JSON text may hold, and which are finite numbers
regular_files.py  opens regular files only, up to a size
whole_files.py    writes a file that appears complete or not at all
source_errors.py  errors of the file system that a checkpoint is on
memory_errors.py  memory that this process may not have
own_folders.py    opens folders into which only this user can write
packages.py       packages that may be missing, what they are for, and how to install them
str_enum.py       `StrEnum`, which Python 3.10 does not have
json_form.py      values of this package as JSON, by one rule
version.py        the version of this package
"""
