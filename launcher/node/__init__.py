"""What runs once a node: the supervisor, torch's elastic agent, the watchdog, the preflight."""
