"""What is kept and shown: tables, intervals, files, run directories, progress bars and plots."""
