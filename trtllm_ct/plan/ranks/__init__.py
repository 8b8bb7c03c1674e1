"""Parts of a plan: the slices of tensor-parallel ranks, and tiles of some rows.

cuts.py    whether parallel sizes fit a model, and which slices its modules get
narrow.py  the plan of some rows of a module
shard.py   the plan of one rank
"""
