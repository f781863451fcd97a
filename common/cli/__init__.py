"""The command line: subcommands, options, exit statuses. Only this room knows them."""
