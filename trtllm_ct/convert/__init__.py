"""From directory to directory: a compressed-tensors checkpoint in, a ModelOpt or plain one out.

convert.py       convert_checkpoint, and its report
hf_directory.py  the files of the output, in order
job.py           a conversion as its workers see it
units.py         modules that one worker converts together
coordinate.py    units handed out, recorded, and their faults gathered
executors.py     threads, or the ranks of an MPI job
worker.py        one unit: read, checked, converted, written
tiles.py         a module's large tensors, some rows at a time
direct.py        modules that loops convert without torch
journal.py       what is done, for a run that resumes
"""
