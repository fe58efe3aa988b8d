"""The last lines of what runs in the sandbox, behind `inside.py` and `remote.py`."""

main()  # type: ignore[name-defined]  # noqa: F821
