"""Results and how they are stored and shown: tables, intervals, files, run directories, progress bars and plots."""
