"""What makes a run dependable: folder, log, resume, devices, files. It holds nothing of the methods."""
