"""Read, write and list safetensors files. Nothing in this folder knows about quantization.

source.py       where the files of a checkpoint are: a folder of this machine, or a place far away
opening.py      which of these a name means
remote.py       parts of files that are far away, many at once
staged.py       files that are far away, fetched into a working directory one at a time
hub/            repositories of the Hugging Face Hub
object_store.py  other stores, through fsspec
header.py       parse and check the header of one safetensors file
catalog.py      every tensor of a directory by name, from the headers alone
reader.py       tensors and their bytes as views of memory-mapped files
read_errors.py  the errors for files that can't be read
windows.py      maps of files, or of parts of them where the address space is limited
open_files.py   descriptors of weight files, a few at a time
runs.py         short reads from many tensors, without memory-mapping a file
snapshot.py     the files that belong to a checkpoint directory, and which links may be followed
side_files.py   tokenizer, chat template and other files that are copied unchanged
side_patterns.py  which kinds of such files are known
remote_side_files.py  which of them are fetched of a place far away
remote_code.py  the Python files that a configuration names as code of the model
write_plan.py   the position of every byte of an output
stacks.py       collects the matrices of a tensor that is written in another order
writer.py       write safetensors files, with the tensors in any order
output_files.py  the files of an output, and whether what was written is still in them
copies.py       copy tensors from file to file inside the kernel
transfer.py     copy bytes between files and memory, in chunks
output.py       an output directory that appears complete or not at all
output_place.py  where an output goes, and whether a new directory may be put there
mounts.py       what is mounted where
work_folder.py  the private directory in which an output is made, and how it is told from a user's own
manifest.py     the list of what an output holds, by which it may be replaced
output_errors.py  errors of an output's place and file system, with what to do
folder.py       a directory that is held open, and the names in it
file_calls.py   the file-system calls of a conversion, one function for each
guarded_maps.py  a file that shrinks while it is mapped is an error
"""
