"""`python -m trtllm_ct`: the same as `trtllm-ct`."""

from trtllm_ct.cli.commands import main

if __name__ == "__main__":
    main()
