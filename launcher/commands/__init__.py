"""The subcommands of ``launch``, one module each, imported by name when asked for."""
