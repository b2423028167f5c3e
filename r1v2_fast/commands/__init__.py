"""What the command line does, one file a command; cli.py parses the arguments and prints what comes back."""
