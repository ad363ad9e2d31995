"""The command `hypergrad`: search, resume, list, report."""
