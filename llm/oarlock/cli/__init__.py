"""The `oarlock` command: one file for each subcommand."""
