"""The command line: `parallel-plans list` and `parallel-plans show`."""
