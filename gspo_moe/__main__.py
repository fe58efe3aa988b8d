"""`python -m gspo_moe` and `torchrun -m gspo_moe` are the command `gspo-moe`."""

# Worker processes import this file again: everything heavy waits for the main process.
if __name__ == "__main__":
    import sys

    from gspo_moe.cli import main

    sys.exit(main())
