"""The subcommands of `oarlock`, one file each."""
