"""What the operating system offers: files, processes, memory, the network. Knows nothing of runs."""
