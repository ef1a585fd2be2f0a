"""What all commands share: their flags, help and subcommands, and the errors about what was typed."""
