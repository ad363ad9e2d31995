"""Pictures of a study: one self-contained HTML file, and PNGs."""
