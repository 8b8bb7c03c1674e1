"""Lets `python -m trtllm_ct` run the command line `trtllm-ct`."""

from trtllm_ct.cli.main import main

if __name__ == "__main__":
    main()
