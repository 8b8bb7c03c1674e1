"""The stages in order, and the whole path in memory. Begin with open.py.

open.py           detect, read, catalog, probe and plan a directory
probing.py        the stage that reads the few values which decide a mode
payload.py        checks of the numbers in scales, zero points and indices
mapper.py         CompressedTensorsWeightMapper: one module's plan, run
stream.py         load and map, module after module, on several threads
fused_scalars.py  scalars that the parts of a fused Linear must share
loader.py         CompressedTensorsWeightLoader: weights in memory
config_loader.py  the configuration in the engine's terms
inspection.py     inspect_checkpoint: what headers say about a directory
"""
