"""Verify a checkpoint, and check that a converted directory holds the same weights.

verify.py           verify_checkpoint and its report
converted.py        compares a converted directory with its source, tensor by tensor
shared_scalars.py   checks the scalars that the parts of a fused Linear share
sizes.py            verifies, and checks whether a converted directory holds given parallel sizes
"""
