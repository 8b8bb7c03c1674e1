"""Repositories of the Hugging Face Hub, of which only parts of files are read.

naming.py   which texts name a repository
client.py   a repository at one commit: its files, and parts of them
listing.py  what the Hub says about the files of a repository
ranges.py   one request for some bytes, with its retries and the checks of the answer
session.py  requests through the HTTP library that the installed huggingface_hub uses
faults.py   what went wrong with a repository, and what to do
cache.py    what was read before, by commit
"""
