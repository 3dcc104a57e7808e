"""One module a command: a frozen dataclass `Args` of its flags and `run(args)`, to be read top to bottom."""
