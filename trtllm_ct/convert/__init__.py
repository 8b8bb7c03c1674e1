"""Convert a directory with a compressed-tensors checkpoint into a ModelOpt, plain or engine-build directory.

convert.py       convert_checkpoint and its report
hf_directory.py  writes the files of the output directory
sizes.py         the sizes and the release that a directory was planned for, and what other settings do
job.py           describes a conversion for its workers
staging.py       what only a source far away needs: working folder, room, side files
units.py         groups modules into units of work
stays.py         which file of a source far away is on the disk when
shards.py        fetches these files, lends them to units and removes them
coordinate.py    submits the units, records the finished ones and collects their faults
executors.py     run the units: threads, or the ranks of an MPI job
worker.py        reads, checks, converts and writes one unit
tiles.py         converts the large tensors of a module a few rows at a time
journal.py       records the finished units, so that a stopped run can resume
source_files.py  the identity and samples of source files: are they still what the plan was made from?
"""
