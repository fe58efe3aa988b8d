"""The policy losses, one module each with its objective and its `SPEC`; the module's name is the algorithm's."""
