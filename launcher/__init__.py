"""The user's side: command line, plans, run directories, supervision on the host. Never imports torch."""
