"""Verify a checkpoint, and check that a converted directory holds the same weights.

verify.py           verify_checkpoint and its report
source_check.py     checks the values of a source that no header shows
plain_values.py     looks for numbers in its plain tensors that are not finite
converted.py        compares a converted directory with its source, on all cores
matching.py         which tensors of the two directories are compared, and how
engine_match.py     compares an engine-build checkpoint with its source
engine_shapes.py    which tensors its modules have, with dtype and shape
engine_statements.py  compares what its config.json and quant_cfg.json say with the source, key by key
engine_classes.py   what they must say for each class, and what the class takes for missing keys
engine_exclusions.py  which modules its list of plain ones names
engine_inputs.py    whether it quantizes the inputs of Linears as the source does
engine_keys.py      the keys of its config.json without which its files can't be read
engine_rope.py      what a rotary embedding means on both sides
engine_ranks.py     the files of ranks: the weights of a model that their parts add up to
kernel_order.py     where the codes of a Linear are in the stream of bytes that a kernel reads
pairs.py            one tensor on both sides, compared in chunks of rows
given_scales.py     the scales of inputs that a calibration gave
requantized.py      compares a weight that was rounded on request with the exact one
native.py           the converted side: rows of a delivered weight as codes
native_layouts.py   the converted side: how each native layout is read
native_numbers.py   the converted side: the numbers that bits stand for
source/             the source's side: an independent reading in plain numpy
statements.py       checks what a converted directory's configuration says of its tensors
config_statements.py  compares config.json with that of the source, key by key
other_spellings.py  the keys that a conversion may add to config.json, and what they must say
rotary.py           the same for keys of rotary positions
mode_statements.py  checks the modes in hf_quant_config.json as engines read them
compared_names.py   the names by which engines compare modules with entries and exclusions
files.py            checks that engines read the same weight files as the index names
comparison.py       compares rows, and keeps the worst element
shared_scalars.py   checks the scalars that the parts of a fused Linear share
compare.py          compare_directories: how far two directories are apart, module by module
module_values.py    the values, bytes and scheme of one module of either
sizes.py            verifies, and checks whether a converted directory holds given parallel sizes
"""
