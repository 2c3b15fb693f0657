"""What every module may import: errors, processes, files and safe reading of weights."""
