"""Bytes on disk: safetensors files read, written and listed. Nothing here knows about quantization.

header.py       one safetensors header, read and checked
catalog.py      every tensor of a directory by name, from headers
reader.py       tensors as views of memory-mapped files
byte_reader.py  the same as plain bytes, without torch
runs.py         a few bytes of a few tensors, without mapping a file
side_files.py   tokenizer, chat template and other files that go along unchanged
write_plan.py   where every byte of an output goes
writer.py       safetensors files, written in any order of tensors
transfer.py     bytes between files and memory, in chunks
output.py       an output directory that is there completely or not at all
"""
