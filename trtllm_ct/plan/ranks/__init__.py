"""Plans for a part of a checkpoint: for one rank, or for a range of a module's rows.

cache_bytes.py    what the KV cache holds for each token, on one rank
cuts.py           whether parallel sizes fit a model, and which slices its modules get
held.py           which modules of a directory do not hold the slices of other parallel sizes
narrow.py         restricts the plan of a module to a range of rows
rank_bytes.py     the bytes of the weights that one rank holds
shard.py          restricts a plan to one rank
planned_model.py  the modules of a model whose row lists none, from its plan
"""
